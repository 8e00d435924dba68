"""GGUF files: what is in them, and that llama.cpp cuts, formats, computes and continues as we do."""

import json
import random
import urllib.request
from pathlib import Path

import pytest
import torch
from test_export import SHAPE, build, export, here, logits, some_ids  # noqa: F401  (here is a fixture)
from tokenizers import pre_tokenizers

from common.errors import UserError
from export.gguf_file import gguf_tensors, halves_to_interleaved, splitter_name, write_gguf
from export.ollama import modelfile
from export.tokenizer_files import exported_template
from inference.engine import Engine
from inference.sampling import SamplingParams
from model.chat_template import CHAT_TEMPLATE
from model.convert import interleaved_to_halves
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer, render
from model.vocabulary import ADDED_TOKENS

WANTED = "needs requirements-export.txt"
gguf = pytest.importorskip("gguf", reason=WANTED)
KINDS = {"llama": "llama", "untied": "llama", "yarn": "llama", "qwen3": "qwen3", "granite": "granitemoe",
         "granite_top1": "granitemoe", "qwen3_moe": "qwen3moe"}  # fmt: skip


class LlamaCpp:
    """llama.cpp on one file, as exact as it can be: by default it rounds keys and values to f16."""

    def __init__(self, path):
        x = pytest.importorskip("xllamacpp", reason=WANTED)
        params = x.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 512, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = x.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.use_jinja = True
        self.server = x.Server(params)

    def post(self, path: str, body: dict) -> dict:
        address = f"{self.server.listening_address}/{path}"
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        return self.post("tokenize", {"content": text, "parse_special": True, "add_special": False})["tokens"]

    def template(self, messages, **options) -> str:
        return self.post("apply-template", {"messages": messages} | options)["prompt"]

    def greedy(self, ids: list[int], n: int, top: int = 0, **options) -> dict:
        body = {"prompt": ids, "n_predict": n, "temperature": 0, "n_probs": top, "return_tokens": True} | options
        return self.post("completion", body | {"ignore_eos": False, "cache_prompt": False})


# ------------------------------------------------------------------------------------------------ what is in the file
def read(path, *starts) -> tuple[dict, dict]:
    """What the file says under the names that begin so, and its tensors by name."""
    reader = gguf.GGUFReader(path)
    said = {name: field.contents() for name, field in reader.fields.items() if name.startswith(starts)}
    return said, {tensor.name: tensor for tensor in reader.tensors}


def test_rows_of_queries_and_keys_are_reordered():
    weight = torch.arange(8.0).unsqueeze(-1)  # two heads of width 4; pairs (0, 2), (1, 3) of each become neighbours
    assert halves_to_interleaved(weight, 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    weight = torch.randn(96, 7)
    assert torch.equal(interleaved_to_halves(halves_to_interleaved(weight, 12), 12), weight)


def test_the_file_holds_the_shape_and_every_number(tmp_path):
    for kind in ("untied", "qwen3", "granite", "qwen3_moe"):
        arch = KINDS[kind]
        model = build(kind)
        assert write_gguf(tmp_path / "x.gguf", model, load_tokenizer(), kind) == arch
        meta, tensors = read(tmp_path / "x.gguf", f"{arch}.", "general.")
        c = model.config
        assert meta["general.architecture"] == arch and meta["general.name"] == kind
        assert meta[f"{arch}.attention.head_count_kv"] == c.n_kv_heads
        assert meta[f"{arch}.attention.key_length"] == c.head_dim
        assert meta[f"{arch}.rope.freq_base"] == c.rope_theta and meta[f"{arch}.context_length"] == c.max_seq_len
        assert sum(int(tensor.n_elements) for tensor in tensors.values()) == c.parameter_count()
        for name, tensor in gguf_tensors(model):
            assert torch.equal(torch.tensor(tensors[name].data), tensor)


def test_half_eight_and_four_bits(tmp_path):
    model = build("granite", moe_hidden_dim=48)  # rows of 48 do not fill blocks of 32: they stay f16
    kinds = {"float16": "F16", "bfloat16": "BF16", "q4_0": "Q4_0", "q8_0": "Q8_0"}
    for dtype, kind in kinds.items():
        write_gguf(tmp_path / "x.gguf", model, load_tokenizer(), "x", dtype)
        _, tensors = read(tmp_path / "x.gguf", "general.")
        stored = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
        assert stored["blk.0.attn_q.weight"] == kind
        assert stored["token_embd.weight"] == ("Q8_0" if kind == "Q4_0" else kind)
        assert stored["output_norm.weight"] == stored["blk.0.ffn_gate_inp.weight"] == "F32"
        assert stored["blk.0.ffn_down_exps.weight"] == ("F16" if kind.startswith("Q") else kind)
    found = gguf.quants.dequantize(tensors["blk.1.attn_v.weight"].data, gguf.GGMLQuantizationType.Q8_0)
    weight = model.model.layers[1].self_attn.v_proj.weight.detach()
    step = weight.view(-1, 32).abs().amax(-1) / 127  # q8_0: 32 numbers share a scale, 127 steps either way
    error = (torch.tensor(found) - weight).view(-1, 32).abs()
    assert (error <= (0.5 + 127 * 2**-11) * step.unsqueeze(-1)).all()  # the scale itself is rounded to f16


def test_types_of_tokens_and_unused_entries(tmp_path):
    write_gguf(tmp_path / "x.gguf", build("llama", vocab_size=6404), load_tokenizer(), "x")
    meta, _ = read(tmp_path / "x.gguf", "tokenizer.")
    assert meta["tokenizer.ggml.eos_token_id"] == 2 and meta["tokenizer.ggml.pre"] == "qwen2"
    types = dict(zip(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"], strict=True))
    control, own, unused, normal = (int(gguf.TokenType[t]) for t in ("CONTROL", "USER_DEFINED", "UNUSED", "NORMAL"))
    for token in ADDED_TOKENS:
        assert types[token] == (control if token.startswith("<|") else own)
    assert types["[UNUSED6403]"] == unused and types["a"] == normal and len(types) == 6404
    assert meta["tokenizer.chat_template"] == exported_template(CHAT_TEMPLATE)
    assert meta["tokenizer.ggml.add_bos_token"] is False  # the template writes it


def test_a_base_model_begins_with_its_start_token_and_does_not_say_it_chats(tmp_path):
    model, tokenizer = build("llama"), load_tokenizer()
    write_gguf(tmp_path / "x.gguf", model, tokenizer, "x", base=True)
    meta, _ = read(tmp_path / "x.gguf", "tokenizer.")
    assert meta["tokenizer.ggml.add_bos_token"] is True and "tokenizer.chat_template" not in meta
    server, engine = LlamaCpp(tmp_path / "x.gguf"), Engine(model, tokenizer)
    for prompt in ("春天", "今天天气很", "The", "1+1="):
        asked = server.greedy(prompt, 8)  # a string: llama.cpp encodes it itself
        ours = engine.generate([prompt], SamplingParams(max_tokens=8, temperature=0))[0]
        assert asked["tokens"] == ours.token_ids


def test_what_llama_cpp_cannot_do_is_refused(tmp_path):
    tokenizer = load_tokenizer()
    for kind, change, words in (
        ("qwen3_moe_raw", {}, "normalises"),
        ("yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "beta_fast"),
    ):
        with pytest.raises(ValueError, match=words):
            write_gguf(tmp_path / "x.gguf", build(kind, **change), tokenizer, "x")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\w+"}
    with pytest.raises(ValueError, match="cuts text"):
        splitter_name(type(tokenizer)(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(content))))


# --------------------------------------------------------------------------------------------------------- llama.cpp
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same(tmp_path, kind):
    model, ids = build(kind), some_ids(1, 200)
    write_gguf(tmp_path / "x.gguf", model, load_tokenizer(), kind)
    found = LlamaCpp(tmp_path / "x.gguf").greedy(ids[0].tolist(), 1, top=20)["completion_probabilities"][0]
    ours = logits(model, ids)[0, -1].log_softmax(-1)
    assert found["id"] == ours.argmax()
    for token in found["top_logprobs"]:
        assert token["logprob"] == pytest.approx(ours[token["id"]].item(), abs=1e-4)


@pytest.mark.parametrize(("kind", "dtype", "near"), [
    ("llama", "float16", 0.01), ("llama", "q8_0", 0.2), ("granite", "bfloat16", 0.2), ("granite", "q8_0", 0.2),
    ("llama", "q4_0", 3),
])  # fmt: skip
def test_llama_cpp_loads_rounded_weights(tmp_path, kind, dtype, near):
    model, ids = build(kind), some_ids(1, 200)
    write_gguf(tmp_path / "x.gguf", model, load_tokenizer(), kind, dtype)
    found = LlamaCpp(tmp_path / "x.gguf").greedy(ids[0].tolist(), 1, top=20)["completion_probabilities"][0]
    ours = logits(model, ids)[0, -1].log_softmax(-1)
    differences = [abs(token["logprob"] - ours[token["id"]].item()) for token in found["top_logprobs"]]
    assert 1e-6 < max(differences) < near, max(differences)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model, its GGUF file, the texts it learned): greedy text of a random model would soon repeat itself."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(LMConfig(**(SHAPE | {"initializer_range": 0.02})))
    tokenizer = load_tokenizer()
    rows = [json.loads(line) for line in open("dataset/sample/sft.jsonl", encoding="utf-8")]
    chats = [row["conversations"] for row in rows[::10]][:12]
    ids = [render(tokenizer, chat)[0][:64] for chat in chats]
    batch = torch.zeros(len(ids), 64, dtype=torch.long)
    for i, row in enumerate(ids):
        batch[i, : len(row)] = torch.tensor(row)
    labels = batch.masked_fill(batch == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        model(batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("trained") / "x.gguf"
    write_gguf(path, model.eval(), tokenizer, "trained")
    return model, path, chats


def assert_same_greedy_text(model, path, prompts, n=64):
    """Token for token, n of them: the tokens that end a text may not be chosen."""
    server, texts, ends = LlamaCpp(path), set(), [0, model.config.eos_token_id]
    for prompt in prompts:
        start = torch.tensor([prompt])
        ours = model.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=n, do_sample=False, suppress_tokens=ends
        )[0, len(prompt) :].tolist()
        theirs = server.greedy(prompt, n, logit_bias=[[token, False] for token in ends])["tokens"]
        assert ours == theirs and len(ours) == n
        texts.add(tuple(ours))
    assert len(texts) > len(prompts) // 2  # the texts are not all the same one


def test_greedy_text_of_a_trained_model(trained):
    model, path, chats = trained
    tokenizer = load_tokenizer()
    prompts = [render(tokenizer, chat[:1], add_generation_prompt=True)[0] for chat in chats[:10]]
    assert_same_greedy_text(model, path, prompts)


def some_texts() -> list[str]:
    """Lines of the sample, and strings of pieces on which tokenizers differ."""
    texts = []
    for name in ("sft", "dpo", "reason", "pretrain"):
        texts += Path(f"dataset/sample/{name}.jsonl").read_text("utf-8").splitlines()[:40]
    pieces = """é e\u0301 ﬁ Ω 😀 👨‍👩‍👧 🇨🇳 １２ ½ Ⅷ ٣ हि 한 か カ 中文 字 ，。 ！？
                's 'S 're ’s don't ſ a B 1 23 ... -- _ < > |"""
    blanks = [" ", "\n", "\r\n", "\t", "\u3000", "\u00a0", "\x0b", "\u2028", "\ufeff", "\u200b", "\x01"]
    pieces = [*pieces.split(), *blanks, *ADDED_TOKENS, "\U00020000"]
    rng = random.Random(0)
    return texts + ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(500)]


def test_the_same_ids_for_any_text(trained):
    server, tokenizer = LlamaCpp(trained[1]), load_tokenizer()
    for text in some_texts():
        assert server.tokenize(text) == tokenizer(text)["input_ids"], text


def test_the_same_ids_with_minimind_s_way_to_cut(tmp_path):
    """MiniMind's vocabularies cut text as GPT-2 does."""
    tokenizer = load_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert splitter_name(tokenizer) == "gpt-2"
    write_gguf(tmp_path / "x.gguf", build("llama"), tokenizer, "x")
    server, ours, cut = LlamaCpp(tmp_path / "x.gguf"), load_tokenizer(), 0
    for text in some_texts()[:200]:
        ids = tokenizer(text)["input_ids"]
        assert server.tokenize(text) == ids, text
        cut += ids != ours(text)["input_ids"]
    assert cut > 20  # the two ways do differ


def test_its_jinja_engine_renders_our_template(trained):
    server, tokenizer = LlamaCpp(trained[1]), load_tokenizer()
    tool = {"type": "function", "function": {"name": "add", "description": "加法", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "二"}'}}
    user, answer = {"role": "user", "content": " 你好\n"}, {"role": "assistant", "content": "\n你好！ "}
    result = {"role": "tool", "content": "3", "tool_call_id": "1"}
    calls = {"role": "assistant", "content": "看", "tool_calls": [call, call]}
    chats = [
        ([user], None),
        ([{"role": "system", "content": "简短。"}, user, answer, user], None),
        ([{"role": "system", "content": "简短。"}, user], [tool, tool]),
        ([user, calls, result, result, answer, user], [tool]),
        ([user, answer | {"reasoning_content": "想\n"}, user], None),
    ]
    for messages, tools in chats:
        options = {"tools": tools} if tools else {}
        ours = tokenizer.decode(render(tokenizer, messages, add_generation_prompt=True, tools=tools)[0])
        assert server.template(messages, **options) == ours
    for switch in (True, False):
        ours = tokenizer.decode(render(tokenizer, [user], add_generation_prompt=True, enable_thinking=switch)[0])
        assert server.template([user], chat_template_kwargs={"open_thinking": switch}) == ours


def test_a_chat_through_its_own_server(trained):
    model, path, chats = trained
    server, tokenizer = LlamaCpp(path), load_tokenizer()
    body = {"messages": chats[0][:1], "max_tokens": 20, "temperature": 0}
    said = server.post("v1/chat/completions", body)["choices"][0]["message"]["content"]
    prompt = torch.tensor([render(tokenizer, chats[0][:1], add_generation_prompt=True)[0]])
    ours = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    assert said == tokenizer.decode(ours[0, prompt.shape[1] :], skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------------- the program
def test_gguf_and_modelfile_from_the_program(here, capsys):  # noqa: F811
    result = export(capsys, "--format", "gguf", "--dtype", "f16", "--out", "m/chat.gguf")
    assert result["files"] == ["Modelfile", "chat.gguf"] and result["dtype"] == "float16"
    text = Path("m/Modelfile").read_text("utf-8")
    assert "FROM ./chat.gguf\n" in text and 'PARAMETER stop "<|im_end|>"' in text and "<tool_response>" in text
    before = Path("m/chat.gguf").read_bytes()
    export(capsys, "--format", "gguf", "--dtype", "f16", "--out", "m/chat.gguf")
    with pytest.raises(UserError, match="m/chat.gguf is there with other content"):
        export(capsys, "--format", "gguf", "--out", "m/chat.gguf")
    assert Path("m/chat.gguf").read_bytes() == before and len(list(Path("m").iterdir())) == 2
    folder = export(capsys, "--format", "gguf", "--dtype", "q8_0", "--out", "g")
    assert folder["out"] == "g/model.gguf" and "FROM ./model.gguf" in Path("g/Modelfile").read_text("utf-8")


def test_modelfiles_of_base_models_and_other_vocabularies():
    tokenizer = load_tokenizer()
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile("x.gguf", tokenizer, base=True)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = "<s>", "</s>", "{{ messages }}"
    assert "<s>{{ .Role }}\n{{ .Content }}</s>" in modelfile("x.gguf", tokenizer, base=False)
