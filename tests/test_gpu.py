"""What must hold on a GPU, as far as a CPU can show it: types, waits, launches, compiled graphs, float16's scaler.

The slow tests run whole stages on a pretended GPU, see tests/pretended/gpu.py.
"""

import inspect
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model.attention as attention_file
import model.model as model_file
from common.device import pick_dtype
from common.errors import RunFailed
from inference.engine import Engine
from inference.sampling import SamplingParams
from model.attention import DocumentLengths, document_ends, repeat_heads
from model.expert_loop import experts_kind
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM, next_token_losses
from model.tokenizer import load_tokenizer
from trainer.engine import MOST_IN_A_ROW, TrainingEngine
from trainer.log import device_flops
from trainer.loop import language_model, take_step
from trainer.losses import lm_loss
from trainer.memory import rows_that_fit
from trainer.optimizers import Muon, orthogonalise
from trainer.stage_flags import parse, stage_parser
from trainer.world import World

SMALL = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 64, "vocab_size": 320}
CPU = torch.device("cpu")


def small(**fields):
    torch.manual_seed(0)
    return MiniMindForCausalLM(LMConfig(**(SMALL | fields)))


def batch_of(B=2, T=24):
    ids = torch.randint(3, 320, (B, T), generator=torch.Generator().manual_seed(1))
    segments = torch.ones_like(ids)
    segments[:, T // 2 :] = 2
    return {"input_ids": ids, "labels": ids, "segment_ids": segments, "count": torch.tensor(B * (T - 1)),
            "real_tokens": torch.tensor(B * T)}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ types
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("use_moe", [False, True])
def test_attention_is_given_one_type_under_autocast(qk_norm, use_moe, monkeypatch):
    """Weights and angles are float32; the kernels for half precision take no other, and no mixture."""
    seen = []
    attend = attention_file.attend
    monkeypatch.setattr(
        attention_file,
        "attend",
        lambda q, k, v, mask: seen.append({q.dtype, k.dtype, v.dtype}) or attend(q, k, v, mask),
    )
    batch = batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        small(qk_norm=qk_norm, use_moe=use_moe).train()(batch["input_ids"], segment_ids=batch["segment_ids"])
    assert seen == [{torch.bfloat16}] * 2


def test_the_variable_length_kernel_knows_every_keyword_we_pass(monkeypatch):
    kernel = pytest.importorskip("torch.nn.attention.varlen", reason="torch before 2.10").varlen_attn
    passed = {}
    monkeypatch.setattr(attention_file, "varlen_attn", lambda q, k, v, *more, **keywords: passed.update(keywords) or q)
    q, kv = torch.zeros(1, 4, 6, 8), torch.zeros(1, 2, 6, 8)
    DocumentLengths(document_ends(torch.ones(1, 6, dtype=torch.long)), 6).attend(q, kv, kv)
    assert passed and passed.keys() <= inspect.signature(kernel).parameters.keys()


def test_keys_are_repeated_for_a_kernel_that_cannot_share_them(monkeypatch):
    """torch 2.11's has no enable_gqa."""
    given = {}
    monkeypatch.setattr(attention_file, "VARLEN_ARGUMENTS", frozenset({"window_size"}))
    monkeypatch.setattr(
        attention_file, "varlen_attn", lambda q, k, v, *more, **keywords: given.update(keywords, k=k, v=v) or q
    )
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    DocumentLengths(document_ends(torch.ones(1, 6, dtype=torch.long)), 6).attend(q, k, k + 1)
    assert given.keys() == {"window_size", "k", "v"} and given["k"].shape == (6, 4, 8)
    assert torch.equal(given["k"].transpose(0, 1)[None], k[:, [0, 0, 1, 1]])
    assert torch.equal(repeat_heads(k, 4), k[:, [0, 0, 1, 1]])


def test_the_router_is_computed_in_float32():
    """Under autocast its scores are those of the float32 product of what it is given."""
    block = small(use_moe=True).model.layers[0].mlp
    x = torch.randn(5, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        scores = block._scores(x)
    assert torch.equal(scores, (x.float() @ block.gate.weight.T).softmax(dim=-1))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_engine_generates_under_autocast(qk_norm):
    """GRPO's rollout: float32 weights, half-precision products, keys and values of one type in the cache."""
    tokenizer = load_tokenizer()
    model = small(vocab_size=len(tokenizer), qk_norm=qk_norm).eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = Engine(model, tokenizer).generate(["春天", "一年有四个季节"], SamplingParams(max_tokens=6, seed=1))
    assert all(len(completion.token_ids) == 6 for completion in found)


def test_experts_and_half_precision_by_compute_capability(monkeypatch):
    gpu, shape = torch.device("cuda:0"), (4, 128, 64)
    for capability, kind, dtype in (
        ((7, 5), "loop", torch.float16),
        ((8, 0), "loop", torch.bfloat16),
        ((8, 6), "loop", torch.bfloat16),
        ((9, 0), "grouped_mm", torch.bfloat16),
        ((10, 0), "grouped_mm", torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, c=capability: c)
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, c=capability: including_emulation or c[0] > 7,
        )
        assert experts_kind(gpu, torch.bfloat16, shape) == kind and pick_dtype("auto", gpu) == dtype
        assert experts_kind(gpu, torch.float32, shape) == "loop"


# ------------------------------------------------------------------------------------------------- losses and steps
@pytest.mark.parametrize("frozen", [False, True])
def test_losses_in_chunks_equal_those_of_all_logits(frozen, monkeypatch):
    """In values and gradients, kept (CPU) or computed again (GPU), with chunks that divide nothing evenly."""
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 320, bias=False).requires_grad_(not frozen)
    labels = torch.where(torch.rand(3, 11) < 0.3, -100, torch.randint(320, (3, 11)))
    hidden = torch.randn(3, 11, 32, requires_grad=True)
    weight = torch.rand(3, 10)
    wanted = torch.nn.functional.cross_entropy(
        head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    ).view(3, 10)
    learned = [hidden] if frozen else [hidden, head.weight]
    gradients = torch.autograd.grad((wanted * weight).sum(), learned)
    for chunk, again in ((7, False), (7, True), (1000, True)):
        monkeypatch.setattr(model_file, "LOSS_CHUNK_CPU", chunk)
        with monkeypatch.context() as patch:
            if again:  # the way of a GPU
                patch.setattr(model_file, "recomputes", lambda tensor: True)
            found = next_token_losses(hidden, head, labels)
            torch.testing.assert_close(found, wanted)
            for ours, theirs in zip(torch.autograd.grad((found * weight).sum(), learned), gradients):
                torch.testing.assert_close(ours, theirs)
    assert found.sum().item() == pytest.approx(lm_loss(head(hidden), labels)[0].item(), rel=1e-6)


def stage_args(*flags):
    return parse(stage_parser("pretrain", ""), ["--device", "cpu", *flags])


def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    """A finite loss with such a gradient: noticed before the step, not after it."""
    model = small()
    engine = TrainingEngine(model, stage_args(), World(0, 1, CPU, torch.float32))
    model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RunFailed, match="gradient's norm is (nan|inf) at step 8; the weights are as they were"):
        take_step(engine, [batch_of()], language_model, 1.0, 7)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_float16_passes_over_a_step_lowers_its_scale_and_counts():
    """The scaler is a CPU's here; the arithmetic stays float32, as a CPU has none of float16."""
    model = small()
    engine = TrainingEngine(model, stage_args("--optimizer", "muon"), World(0, 1, CPU, torch.float16))
    engine.world.autocast = lambda: torch.autocast("cpu", enabled=False)
    broken = [True]
    model.model.norm.weight.register_hook(lambda gradient: gradient * float("nan") if broken[0] else gradient)
    before = [p.clone() for p in model.parameters()]
    scale = engine.scaler.get_scale()
    for step in (1, 2):
        numbers, _ = take_step(engine, [batch_of()], language_model, 1.0, step)
        assert numbers["passed_over"] == step and engine.scaler.get_scale() == scale / 2**step
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    broken[0] = False
    numbers, _ = take_step(engine, [batch_of()], language_model, 1.0, 3)
    assert numbers["passed_over"] == 2 and not torch.equal(before[0], next(model.parameters()))
    plain = small()
    take_step(TrainingEngine(plain, engine.args, World(0, 1, CPU, torch.float32)), [batch_of()], language_model, 1.0, 3)
    for name, parameter in plain.named_parameters():  # scaled and unscaled again, the step is the ordinary one
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)
    broken[0] = True
    with pytest.raises(RunFailed, match="gradient's norm is nan"):
        for step in range(MOST_IN_A_ROW + 1):
            take_step(engine, [batch_of()], language_model, 1.0, step)
    assert step == MOST_IN_A_ROW - 1


# -------------------------------------------------------------------------------------------------- launches, graphs
class Operations(TorchDispatchMode):
    """Names of the operations that compute something."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function._schema.name] += not function.is_view
        return function(*args, **(kwargs or {}))


def test_muon_takes_equal_shapes_together_and_changes_nothing():
    shapes = [(8, 8)] * 6 + [(4, 8)] * 5 + [(24, 8), (8, 24), (3, 6, 8), (3, 6, 8)]
    torch.manual_seed(0)
    together = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    one, many = Muon(together, lr=0.1), [Muon([p], lr=0.1) for p in alone]
    for _ in range(3):
        for a, b in zip(together, alone):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        with Operations() as done:
            one.step()
        for optimizer in many:
            optimizer.step()
    assert max((a - b).abs().max().item() for a, b in zip(together, alone)) < 5e-7
    assert done.names.total() <= 60 * len(set(shapes))


def test_muon_is_momentum_made_orthogonal():
    """One matrix, two steps, by the formula."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4, 6))
    wanted, momentum = p.detach().clone(), torch.zeros(4, 6)
    optimizer = Muon([p], lr=0.1, weight_decay=0.2, momentum=0.9)
    for _ in range(2):
        gradient = torch.randn(4, 6)
        p.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        update = orthogonalise(0.1 * gradient + 0.9 * momentum)
        wanted = wanted * (1 - 0.1 * 0.2) - 0.1 * 0.2 * 6**0.5 * update
        torch.testing.assert_close(p.detach(), wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dense_model_compiles_to_one_graph(checkpointing):
    """Losses included, whatever documents the rows hold; a second one, for another length, serves all lengths."""
    from torch._dynamo.utils import counters

    from model.compat import checkpoint_activations

    torch._dynamo.reset()
    counters.clear()
    model = small().train()
    if checkpointing:
        checkpoint_activations(model)
    compiled = torch.compile(model, backend="aot_eager")
    found = defaultdict(list)
    for step, T in enumerate((64, 64, 128, 192, 128)):
        batch = batch_of(T=T)
        batch["segment_ids"][0, 5 + 3 * step :] += 1
        ends = document_ends(batch["segment_ids"], size=9)
        out = compiled(batch["input_ids"], segment_ids=batch["segment_ids"], document_ends=ends,
                       labels=batch["labels"], reduction="none")  # fmt: skip
        out.loss.sum().backward()
        found[T].append(counters["stats"]["unique_graphs"])
    assert found[64] == [1, 1] and found[128][0] <= 2 and found[192] + found[128] == [2, 2, 2]
    assert not counters["graph_break"]


# ------------------------------------------------------------------------------------------------ this and that card
def test_a_gpu_takes_as_many_rows_together_as_fit(monkeypatch):
    config = LMConfig.from_preset("minimind2")
    args = Namespace(seq_len=512, optimizer="muon", gradient_checkpointing=False, batch_size=8, accumulation_steps=4)
    world = World(0, 1, torch.device("cuda:0"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    for gigabytes, rows in ((80, 32), (24, 32), (10, 16), (4, 8)):
        properties = Namespace(total_memory=gigabytes * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None, p=properties: p)
        assert rows_that_fit(config, args, world, config.parameter_count()) == (rows, 32 // rows)


def test_rows_given_by_a_flag_stay(tmp_path):
    assert not stage_args().batch_given and stage_args().batch_size == 8
    for flags in (["--batch_size", "8"], ["--accumulation_steps", "2"]):
        assert stage_args(*flags).batch_given


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
     ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 3090 Ti", 80), ("NVIDIA GeForce RTX 4070 Ti SUPER", 80),
     ("Tesla T4", 65), ("NVIDIA GeForce RTX 3080 Laptop GPU", 0), ("NVIDIA GeForce GT 710", 0)],
)  # fmt: skip
def test_peak_speed_by_the_cards_name(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device_flops(World(0, 1, torch.device("cuda:0"), torch.bfloat16)) == tflops * 1e12


# -------------------------------------------------------------------------------------------------- a pretended GPU
PRETENDED = Path(__file__).resolve().parent / "pretended"


def pretended(script: str, *arguments) -> dict:
    if shutil.which("g++") is None:
        pytest.skip("a pretended GPU is compiled: no g++ here")
    if torch.version.cuda:
        pytest.skip("a pretended GPU needs a torch that is built for the CPU alone")
    command = [sys.executable, str(PRETENDED / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["7.5", "8.6", "9.0"])
def test_every_stage_on_a_pretended_gpu(capability, tmp_path):
    """Three steps of each: no wrong type, the losses of float32, and one wait a step and a token."""
    for run, found in pretended("stages.py", capability, tmp_path).items():
        assert found["error"] is None, (run, found["error"])
        if run == "grpo fixed":  # sums of advantages that cancel: near 0 at the start, so not relative
            assert found["losses"] == pytest.approx(found["cpu_losses"], abs=5e-3)
        elif run != "grpo":
            assert found["losses"] == pytest.approx(found["cpu_losses"], rel=1e-3), run
        micro_batches, layers = 2, 2
        loop = layers * micro_batches if run == "pretrain moe" and capability == "8.6" else 0
        for step in found["steps"][1:]:
            assert sum(step["waits"].values()) == 1 + loop, (run, step["waits"])
            kernel = [] if capability == "7.5" else ["torch.bfloat16 torch.bfloat16 torch.bfloat16"]
            assert step["attention"] == kernel, run
        if run == "grpo":
            waits = [sum(step["waits"].values()) for step in found["decode"]]
            assert waits.count(1) > 30 and len(waits) - waits.count(1) <= 6  # those that read prompts wait once more


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 32])
def test_the_memory_formula_is_what_is_counted(rows):
    presets = ("minimind2-small", "minimind3", "minimind2", "minimind2-moe", "minimind3-moe", "minimind-v1")
    for preset, found in pretended("memory.py", rows, *presets).items():
        assert 0.92 < found["said"] / found["counted"] < 1.2, (preset, found)
