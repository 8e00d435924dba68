"""The course agrees with the code and with its records, and its small programs compute what they say."""

import json
import math
import multiprocessing
import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stage import ROOT, chat_weights, load, write_texts
from test_dist import free_port
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from common.errors import UserError
from course import checks, pages
from data.packing import pack
from exams import exam, exam_report
from figures.records import record_of, result_of
from inference.engine import Engine
from inference.sampling import SamplingParams, filtered
from inspection.trace import trace
from model.LMConfig import PRESETS, LMConfig
from model.lora import add_lora
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer, render, render_spans
from trainer import losses
from trainer.losses import lm_loss
from trainer.optimizers import orthogonalise

CODE = ROOT / "docs" / "course" / "code"


def test_every_page_is_what_the_code_and_the_records_say():
    assert pages.stale() == []


def test_sections_twins_commands_links_and_pictures_hold():
    assert checks.faults() == []


# -------------------------------------------------------------------------------------------- the machinery notices
def page(name="01-bigram.md") -> tuple:
    path = pages.COURSE / name
    return path, path.read_text(encoding="utf-8")


def test_a_quote_a_number_and_an_output_are_written_anew():
    path, text = page()
    loss = f"{result_of('bigram')['losses']['200']:.2f}<!-- = bigram losses.200 .2f -->"
    spoiled_parts = (loss, loss.replace(".", "9.", 1)), ("logits.logsumexp", "logsum"), ("by counting: loss", "loss")
    for old, new in spoiled_parts:
        assert old in text
        spoiled = text.replace(old, new)
        assert spoiled != text and pages.filled(spoiled, path) == text


def test_a_quote_can_begin_and_end_at_a_line_and_leave_out_the_docstring():
    whole = pages.quote("model/moe.py FeedForward.forward")
    assert whole.splitlines()[2] == "def forward(self, x: Tensor) -> Tensor:"
    part = pages.quote('model/moe.py route from="if normalise and" to="weight / weight.detach"')
    assert part.splitlines()[2:-1] == ["if normalise and k == 1:", "    weight = weight / weight.detach()"]
    assert '"""' not in pages.quote('model/moe.py route without="docstring"')


@pytest.mark.parametrize(
    ("directive", "message"),
    [
        ("model/nothing.py f", "no file"),
        ("model/moe.py Router", "has no Router"),
        ('model/moe.py route from="gone"', "no line with 'gone'"),
        ("model/LMConfig.py LMConfig", "more than"),
    ],
)
def test_a_quote_that_is_gone_is_named(directive, message):
    with pytest.raises(pages.UserError, match=message):
        pages.quote(directive)


def test_a_long_output_loses_its_middle_and_names_how_much():
    lines = record_of("next_char")["output"].splitlines()
    block = pages.output_block("next_char", 3, 1).splitlines()
    assert block[1:4] == lines[:3]
    assert block[4] == f"... ({len(lines) - 4} lines)"


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("python 1-pretrain.py --data_path dataset/sample/pretrain.jsonl --epochs 2", None),
        ("python 1-pretrain.py --epochs 2", "names no data"),
        ("python 1-pretrain.py --epoch_count 2", "epoch_count"),
        ("python 9-nothing.py", "no file"),
        ("python -m model.Nothing", "no module"),
        ("python data_process.py sample --seeds 3", "seeds"),
        ("git clone REPOSITORY_URL", None),
    ],
)
def test_commands_meet_the_programs_own_parser(command, fault):
    found = checks.of_command(command)
    assert found is None if fault is None else fault in found


def test_what_a_twin_or_a_chapter_lacks_is_named():
    path, text = page()
    assert checks.of_page(path, text) == [] and checks.of_chapter(text, "en") == []
    assert "other formulas" in checks.of_page(path, text.replace("\\eta \\,", "\\eta"))[0]
    assert "other commands" in " ".join(checks.of_page(path, text.replace("--steps 300", "--steps 301")))
    assert "no section 'Formula'" in checks.of_chapter(text.replace("## Formula", "## Sums"), "en")[0]
    assert "two exercises" in checks.of_chapter(text.replace("<details>", "", 1), "en")[0]


# -------------------------------------------------------------------------------------------------- small programs
def test_the_bigram_s_gradient_is_autograd_s_and_leads_to_the_counts():
    bigram = load("docs/course/code/bigram.py")
    torch.manual_seed(0)
    pairs = torch.randint(5, (64, 2))
    W = torch.randn(5, 5, requires_grad=True)
    wanted = torch.autograd.grad(bigram.loss_of(W, pairs), W)[0]
    torch.testing.assert_close(bigram.gradient_by_hand(W.detach(), pairs), wanted)

    assert bigram.loss_of(torch.zeros(5, 5), pairs).item() == pytest.approx(math.log(5))
    W = torch.zeros(5, 5)
    for _ in range(2000):
        W -= 5 * bigram.gradient_by_hand(W, pairs)
    assert bigram.loss_of(W, pairs).item() == pytest.approx(bigram.counted(pairs, 5), abs=2e-3)


def test_byte_pairs_are_merged_as_the_library_merges_them():
    bpe = load("docs/course/code/bpe.py")
    words = {"low": 5, "lower": 2, "newest": 6, "widest": 3, "太阳系": 9, "太阳": 4}
    learned, cut = bpe.learn_merges(Counter(words), 12)
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 12, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator([" ".join([word] * n) for word, n in words.items()], trainer)
    for (tokens, _), word in zip(cut, words, strict=True):
        # As many pieces, of the same lengths: a letter of the library's tokens stands for a byte.
        assert [len(token) for token in tokens] == [len(token) for token in library.encode(word).tokens], word
        assert bpe.encode_steps(word, [pair for pair, _ in learned])[-1] == tokens


def test_counted_contexts_give_the_next_character():
    next_char = load("docs/course/code/next_char.py")
    assert next_char.count_next(["abab", "abc"], 2) == {"ab": Counter("ac"), "ba": Counter("b")}


def test_what_is_written_into_the_stream_adds_up_to_what_leaves_it():
    stream = load("docs/course/code/stream.py")
    for extra in ({}, {"use_moe": True}):
        model = MiniMindForCausalLM(LMConfig.from_preset("tiny", n_layers=2, vocab_size=50, **extra)).eval()
        traced = trace(model, [3, 7, 9])
        parts = stream.written(traced)
        assert [name for name, _ in parts][:2] == ["embedding", "layer 0 attention"] and len(parts) == 5
        final = sum(update for _, update in parts)
        p = traced.logits[-1].softmax(-1)
        assert stream.guess(model, final) == (p.argmax().item(), pytest.approx(p.max().item(), rel=1e-5))


def test_attention_by_hand_is_the_models_own():
    attention = load("docs/course/code/attention.py")
    model = MiniMindForCausalLM(LMConfig.from_preset("tiny", n_layers=2, vocab_size=50)).eval()
    traced = trace(model, [3, 7, 9, 4])
    _, weights, read = attention.attend_by_hand(*attention.queries_keys_values(model, traced.residuals[1], 1))
    torch.testing.assert_close(weights, traced.attention[1])
    with torch.no_grad():
        written = model.model.layers[1].self_attn.o_proj(read.transpose(0, 1).flatten(1))
    torch.testing.assert_close(written, traced.attended[1])


def test_a_rotated_score_depends_on_the_distance_alone():
    result = load("docs/course/code/rotation.py").main(["--preset", "minimind2-small"])
    scores = result["scores"]
    assert scores["5,2"] == pytest.approx(scores["105,102"], abs=1e-3) and abs(scores["5,2"] - scores["5,4"]) > 0.1
    assert result["plain"] < 1e-5 < result["rotated"]


def test_norm_and_experts_by_hand_are_the_models_own():
    result = load("docs/course/code/experts.py").main(["--preset", "minimind2-moe", "--tokens", "8"])
    assert max(result["difference"].values()) < 1e-5 and sum(result["load"]) == 8 * 2
    assert result["balance"]["even"] == pytest.approx(1) and result["balance"]["same_two"] == pytest.approx(2)


def test_backpropagation_by_hand_is_autograd_s_and_a_nudge_s():
    result = load("docs/course/code/backprop.py").main([])
    assert result["difference"] < 1e-12 and result["slope"] == pytest.approx(result["by_hand"], rel=1e-6)


def test_optimizers_by_hand_are_torch_s_and_ours():
    optimizers = load("docs/course/code/optimizers.py")
    assert optimizers.largest_difference_to_torch() < 1e-12
    torch.manual_seed(0)
    matrix = torch.randn(6, 9)
    torch.testing.assert_close(optimizers.muon_direction(matrix), orthogonalise(matrix), atol=1e-4, rtol=1e-4)
    # Along the steep side a step multiplies a by 1 - 50 rate: below 2 / 50 it shrinks, above it grows.
    a = [optimizers.walk("sgd", rate, 60)[0][-1][0] for rate in (0.02, 0.039, 0.041)]
    assert a[0] == 0 and a[1] == pytest.approx(0.95**60, rel=1e-3) and a[2] == pytest.approx(1.05**60, rel=1e-3)
    path = optimizers.walk("adamw", 0.1, 60)[0]
    assert path[1] == pytest.approx([0.9, 0.9]) and path[-1][0] == pytest.approx(path[-1][1], rel=1e-4)


def test_bfloat16_loses_small_steps_and_float16_small_numbers():
    precision = load("docs/course/code/precision.py")
    assert precision.moved(torch.bfloat16, 0.001, 10) == 1 and precision.moved(torch.float32, 0.001, 10) < 0.991
    small = torch.tensor(1e-8, dtype=torch.float16)
    assert small == 0 and torch.tensor(1e-8 * 2**16, dtype=torch.float16) != 0


def test_bits_per_byte_by_hand():
    bits = load("docs/course/code/bits.py")
    model = MiniMindForCausalLM(LMConfig.from_preset("tiny", n_layers=1, vocab_size=50)).eval()
    ids = [3, 7, 9, 4]
    wanted = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert sum(bits.nats(model, ids)) / 3 == pytest.approx(wanted, rel=1e-5)
    assert bits.bits_per_byte(6 * math.log(2), ["国", "abc"]) == 1  # six bits over 3 + 3 bytes
    # Of 2 training tokens one is 1; with 1 added to each of 4 entries its share is 2 / 6.
    assert bits.by_frequency([[0, 1, 2]], [[0, 1]], 4) == pytest.approx(math.log(3))
    assert bits.by_pairs(["abab"], ["ab"]) == pytest.approx(math.log2(4 / 3) / 2)  # (2 + 1) / (2 + 2), two bytes


def test_a_loss_is_smoothed_over_the_last_steps():
    assert load("docs/course/code/read_log.py").smoothed([4.0, 2.0, 0.0, 1.0], window=3) == [4, 3, 2, 1]


def test_documents_are_packed_by_hand_as_the_project_packs_them():
    packing = load("docs/course/code/packing.py")
    assert packing.in_order([5, 5, 3, 2], 8) == [[5], [5, 3], [2]]
    assert packing.best_fit([5, 5, 3, 2], 8) == [[5, 3], [5, 2]]
    lengths = np.random.default_rng(0).integers(2, 40, 300)
    assert len(packing.best_fit(lengths.tolist(), 64)) == len(pack(lengths, 64)[1]) - 1

    documents = [[3, 7, 9], [4, 8]]
    row = packing.one_row(documents, 7)
    assert row["labels"] == [-100, 7, 9, -100, 8, -100, -100] and row["segments"] == [1, 1, 1, 2, 2, 0, 0]
    model = MiniMindForCausalLM(LMConfig.from_preset("tiny", n_layers=1, vocab_size=50)).eval()
    with torch.no_grad():
        packed = model(torch.tensor([row["ids"]]), segment_ids=torch.tensor([row["segments"]])).logits[0, 3:5]
        torch.testing.assert_close(packed, model(torch.tensor([documents[1]])).logits[0])


def test_near_copies_by_hand():
    copies = load("docs/course/code/copies.py")
    assert copies.shingles("一 二，三四") == {"一二三", "二三四"}
    assert copies.jaccard({"a", "b", "c"}, {"b", "c", "d"}) == 0.5
    result = copies.main(["--data_path", str(CODE / "dirty.jsonl")])
    assert result["estimate"] == pytest.approx(result["similarity"], abs=0.12)  # three standard errors


def ring_of(rank: int, size: int, port: int, folder) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = load("docs/course/code/ring.py").main(["--preset", "tiny", "--steps", "2", "--rows", "3"])
    (folder / str(rank)).write_text(json.dumps(found))


def test_three_processes_in_a_ring_learn_what_one_does(tmp_path):
    start, port = multiprocessing.get_context("fork").Process, free_port()
    processes = [start(target=ring_of, args=(rank, 3, port, tmp_path)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    parameters = LMConfig.from_preset("tiny").parameter_count()
    for rank in range(3):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert found["alone"]["moved"] > 1e-3
        assert max(found["ddp"]["difference"], found["zero"]["difference"]) < 1e-4
        assert found["alone"]["state"] == found["ddp"]["state"] == pytest.approx(8 * parameters, abs=100)
        assert found["zero"]["state"] == pytest.approx(8 * parameters / 3, abs=100)
        assert found["zero"]["sent"] == found["ddp"]["sent"] == pytest.approx(4 * 4 * parameters / 3, abs=100)


def test_memory_of_the_zero_stages():
    memory = load("docs/course/code/zero_memory.py").memory
    assert [sum(memory(7e9, stage, 8).values()) / 1e9 for stage in range(4)] == pytest.approx([112, 63, 38.5, 14])
    assert all(memory(5, stage, 1) == {"weights": 20, "gradients": 20, "moments": 40} for stage in range(4))


def test_the_budget_counts_every_parameter_and_divides_by_the_rate():
    budget = load("docs/course/code/budget.py")
    for preset in PRESETS:
        config = LMConfig.from_preset(preset)
        assert sum(budget.parts(config).values()) == config.parameter_count(), preset
    assert budget.seconds(6 * 50e6 * 1e9, 71, 0.3) == pytest.approx(14_085, abs=1)


def test_shapes_differ_in_layers_and_width_alone(tmp_path):
    shapes = load("docs/course/code/shapes.py")
    config = shapes.config_of("6x96", 2400)
    assert (config.n_layers, config.dim, config.n_heads, config.head_dim) == (6, 96, 3, 32)
    with pytest.raises(UserError, match="multiple of 32"):
        shapes.config_of("2x100", 2400)
    data, tokenizer = write_texts(tmp_path / "t.jsonl"), ROOT / "model" / "minimind_tokenizer"
    flags = ["--data_path", data, "--tokenizer", tokenizer, "--shapes", "1x32", "--epochs", "0.1", "--val_split", "0.2"]
    (found,) = shapes.main([*map(str, flags), "--out_dir", str(tmp_path)])["shapes"]
    assert found["embedding"] == 6400 * 32 and 2 < found["mean"] < 6


@pytest.mark.slow
def test_the_server_is_started_asked_and_stopped(tmp_path):
    flags = ["--weight", str(chat_weights(tmp_path)), "--questions", "你好", "--port", str(free_port())]
    result = load("docs/course/code/served.py").main(flags)
    assert result["model"] == "full_sft_32" and 0 < result["answers"][0]["tokens"] <= 64


def test_what_is_drawn_from_is_the_samplers_own():
    sampling = load("docs/course/code/sampling.py")
    p = sampling.probabilities(torch.tensor([2.0, 1.0, 0.0]), top_p=0.9)
    torch.testing.assert_close(p, torch.tensor([0.731, 0.269, 0]), atol=5e-4, rtol=0)  # exercise 1 of chapter 9
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3
    for options in ({"temperature": 0.5}, {"top_k": 7}, {"top_p": 0.8}, {"temperature": 2, "top_k": 20, "top_p": 0.9}):
        ours = filtered(logits.unsqueeze(0), [SamplingParams(**options)])[0].softmax(dim=-1)
        torch.testing.assert_close(sampling.probabilities(logits, **options), ours)
    pieces = torch.tensor([0.5, 0.25, 0.25])
    assert [sampling.draw(pieces, u) for u in (0, 0.49, 0.5, 0.74, 0.75, 0.999)] == [0, 0, 1, 1, 2, 2]


def test_a_simple_cache_gives_the_engines_text_at_the_cost_that_the_formula_says():
    cache, m, n = load("docs/course/code/cache.py"), 5, 12
    torch.manual_seed(1)
    model = MiniMindForCausalLM(LMConfig.from_preset("tiny", n_layers=2, vocab_size=50)).eval()
    ids = [3, 7, 9, 4, 11]
    (without, dear), (with_cache, cheap) = (cache.write(model, ids, n, cached) for cached in (False, True))
    engine = Engine(model, load_tokenizer())
    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    assert without == with_cache == ids + engine.generate([ids], params)[0].token_ids
    assert dear[-1][0] == n * m + n * (n - 1) // 2 and cheap[-1][0] == m + n - 1
    assert dear[-1][1] == sum((m + i) ** 2 for i in range(n)) and cheap[-1][1] == m**2 + sum(range(m + 1, m + n))


def test_the_masked_loss_by_hand_is_the_projects_and_counts_what_the_assistant_says():
    mask, tokenizer = load("docs/course/code/mask.py"), load_tokenizer()
    ids, learned, _ = render_spans(tokenizer, mask.CONVERSATION)
    said = [message["content"] + "<|im_end|>" for message in mask.CONVERSATION if message["role"] == "assistant"]
    assert tokenizer.decode([i for i, m in zip(ids, learned, strict=True) if m]) == "".join(said)
    logits = torch.randn(len(ids), len(tokenizer), generator=torch.Generator().manual_seed(0))
    nats, mean = mask.masked_loss(logits, torch.tensor(ids), torch.tensor(learned))
    labels = torch.tensor([[i if m else -100 for i, m in zip(ids, learned, strict=True)]])
    total, count = lm_loss(logits.unsqueeze(0), labels)
    assert mean.item() == pytest.approx((total / count).item()) and len(nats) == len(ids) - 1
    assert mask.markers_in(tokenizer, "你好") == mask.markers_in(tokenizer, mask.TYPED) == 2


def test_lora_by_hand_its_start_and_its_sizes_are_the_projects():
    lora = load("docs/course/code/lora.py")
    torch.manual_seed(0)
    model = MiniMindForCausalLM(LMConfig.from_preset("tiny", vocab_size=50))
    add_lora(model, 8, 16)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == lora.sizes("tiny")["trained"][8]
    ids = torch.randint(50, (1, 8))
    A, B = lora.start_gradients(model, ids, False)
    assert A == 0 < B and lora.start_gradients(model, ids, True) == (0, 0)
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        for p in layer.adapter["weight"].parameters():
            p.normal_(0, 0.1)
        x = torch.randn(3, layer.in_features)
        by_hand = lora.lora_by_hand(x, layer.weight, layer.adapter["weight"].A, layer.adapter["weight"].B, 16)
        torch.testing.assert_close(by_hand, layer(x))


def test_dpo_by_hand_is_the_trainers_own():
    preference = load("docs/course/code/preference.py")
    model, tokenizer = MiniMindForCausalLM(LMConfig.from_preset("tiny", n_layers=1)).eval(), load_tokenizer()
    messages = [{"role": "user", "content": "1+1=？"}, {"role": "assistant", "content": "2"}]
    ids, mask = map(torch.tensor, render(tokenizer, messages))
    with torch.no_grad():
        nats = model(ids[None], labels=torch.where(mask == 1, ids, -100)[None], reduction="none").loss
    assert preference.log_prob_by_hand(model, tokenizer, messages) == pytest.approx(-nats.sum().item(), rel=1e-5)
    # The numbers of the exercise: the first policy makes both answers likelier, the second both less likely.
    for policy, margin, kl, loss in (((-14.0, -17.0), 0.5, -3.5, 0.4741), ((-26.0, -31.0), 0.7, 9.5, 0.4032)):
        ours = preference.dpo_by_hand(policy, (-20.0, -18.0), 0.1)
        assert (ours["margin"], ours["kl"], ours["loss"]) == pytest.approx((margin, kl, loss), abs=1e-4)
        four = (torch.tensor(x) for x in (*policy, -20.0, -18.0))
        assert losses.dpo_loss(*four, 0.1).item() == pytest.approx(loss, abs=1e-4)


def test_a_student_s_gradient_is_what_it_says_minus_what_the_teacher_says():
    distil = load("docs/course/code/distil.py")
    student, teacher = torch.randn(7, requires_grad=True), torch.randn(7)
    for temperature in (1.0, 2.5):
        wanted = torch.autograd.grad(losses.divergence(student[None], teacher[None], temperature), student)[0]
        by_hand = distil.gradient_by_hand(student.detach(), teacher, temperature)
        torch.testing.assert_close(by_hand, wanted, rtol=1e-4, atol=1e-6)


def test_a_loose_rule_is_cheated_and_the_gradient_is_grpo_s():
    cheat = load("docs/course/code/cheat.py")
    rewards = torch.tensor([[1.2, 1.2, 0.2, 0.2, 0.2, 0.2, 0, 0], [0.2] * 6 + [0, 0]])  # the exercise's two groups
    by_hand = cheat.advantages_by_hand(rewards)
    torch.testing.assert_close(by_hand, losses.group_advantages(rewards))
    torch.testing.assert_close(by_hand[:, [0, -1]], torch.tensor([[1.595, -0.798], [0.539, -1.618]]), rtol=0, atol=2e-3)
    tokens, mask = torch.tensor([[3, 7, 10], [7, 10, 7]]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    found = cheat.judged(tokens, mask, torch.tensor([7, 7]))
    assert found["loose"].tolist() == [1, 1] and found["strict"].tolist() == [0, 1]
    torch.manual_seed(0)
    rows, difference, _ = cheat.train("loose", steps=20, group=8, rate=0.3)
    assert difference < 1e-7
    assert rows[-1]["loose"] > rows[0]["loose"] + 0.2 and rows[-1]["strict"] < 0.15
    assert rows[-1]["length"] > rows[0]["length"]


def test_sums_without_a_carry_are_kept_and_their_steps_dropped(tmp_path):
    sums = load("docs/course/code/sums.py")
    totals = {"用竖式算出23+11的结果。": 34, "27+15=？": None, "61+52=？": 113, "12+5=？": None, "23-11=？": None}
    assert {question: sums.sum_without_carry(question) for question in totals} == totals
    sums.main(["--data_path", str(ROOT / "dataset/sample/reason.jsonl"), "--out", str(tmp_path / "sums.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 100 and all(set(row) == {"question", "answer"} for row in rows)
    assert all(sums.sum_without_carry(row["question"]) == int(row["answer"]) for row in rows)


def test_intervals_by_trying_are_the_reports_own():
    chance = load("docs/course/code/chance.py")
    for right, n in ((0, 10), (3, 10), (10, 10), (77, 308)):
        assert chance.wilson_by_hand(right, n) == pytest.approx(exam_report.wilson(right, n), abs=1e-4)
    assert chance.plain(10, 10) == (1, 1)  # as if ten questions could make one sure
    assert chance.questions_needed(0.25, 0.75) == 14  # (0.1875 + 0.1875) * 36 = 13.5


def test_half_an_exam_is_leaked_as_the_exam_asks_it_and_counted_apart(tmp_path):
    leak, subjects = load("docs/course/code/leak.py"), exam.read_exam(ROOT / "dataset/sample/exam", "ceval")
    rows = leak.leaked(subjects)
    assert len(rows) == sum(-(-len(s.questions) // 2) for s in subjects)
    engine = SimpleNamespace(tokenizer=load_tokenizer(), encode=lambda messages: messages)
    asked = [exam.AskByChat(engine)(subjects[0], question)[0] for question in subjects[0].questions[:3:2]]
    assert asked == [row["conversations"][:-1] for row in rows[:2]]
    subject = exam.Subject("a", "a", None, subjects[0].questions[:4], [])
    answers = [exam.Answer(q, q.answer if i in (0, 1, 2) else "X", [0.25] * 4) for i, q in enumerate(subject.questions)]
    exam_report.write_answers(tmp_path, "val", {"a": answers})
    (tmp_path / "contamination.csv").write_text("subject,number\na,0\na,2\n", encoding="utf-8")
    assert leak.two_halves(tmp_path, [subject], "val") == {"found in training": (2, 2), "not found": (1, 2)}


def test_bits_per_byte_of_an_answer():
    smooth = load("docs/course/code/smooth.py")
    assert smooth.bits_per_byte(math.log(1 / 64), "春天") == pytest.approx(1)  # 6 bits, 6 bytes
