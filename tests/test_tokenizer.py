"""The tokenizer room: golden ids of the committed vocabulary, render against the template, round trips, the CLI."""

import gzip
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.errors import UserError, run_main
from inference.open_model import load_foreign
from model.chat_template import normalise_conversation
from model.tokenizer import encode_document, encode_text, encode_texts, load_tokenizer, render, render_spans
from model.tokenizer_files import DEFAULT_FOLDER, save_tokenizer, tokenizer_from_dict, tokenizer_hash, tokenizer_to_dict
from model.vocabulary import ADDED_TOKENS, MIN_VOCAB_SIZE, build_tokenizer, train_tokenizer
from scripts.train_tokenizer import HEADERS, Corpus, default_files, hash_numbers, main

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("DATA") or ROOT.parent / "shared" / "data")
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"city": {"type": "string"}}}}
SENTENCES = [
    "床前明月光，疑是地上霜。", "The quick brown fox jumps over the lazy dog.", "机器学习是人工智能的一个分支。",
    "def add(a, b):\n    return a + b\n", "The lazy dog sleeps; the quick fox runs.",
    "人工智能正在改变我们学习的方式。",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def auto():
    """The committed folder as any other program loads it, with no code of ours."""
    return AutoTokenizer.from_pretrained(DEFAULT_FOLDER)


# ------------------------------------------------------------------------------------------------ the vocabulary
def test_special_ids(tokenizer, auto):
    for loaded in (tokenizer, auto):
        assert len(loaded) == 6400
        assert loaded.convert_ids_to_tokens(list(range(16))) == list(ADDED_TOKENS)
        ids = (loaded.pad_token_id, loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id)
        assert ids == (0, 0, 1, 2)
        assert loaded.model_max_length == 32768
        # Markers vanish from what a user reads, tags stay: they carry meaning.
        assert loaded.decode([1, 3, 4, 11, 7, 2], skip_special_tokens=True) == "<think></think><tool_call>"
        assert loaded.encode("<|im_start|><think><|reserved_4|>") == [1, 3, 15]  # and nothing is added at the ends


def test_files_are_readable_by_transformers_4_and_5():
    config = json.loads((DEFAULT_FOLDER / "tokenizer_config.json").read_text("utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["chat_template"] == (DEFAULT_FOLDER / "chat_template.jinja").read_text("utf-8")


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_any_text(text):
    tokenizer = load_tokenizer_once()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = encode_text(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert not any(i < 16 for i in ids)


def load_tokenizer_once(cache=[]):  # noqa: B006  (hypothesis functions take no module fixtures)
    if not cache:
        cache.append(load_tokenizer())
    return cache[0]


FAMILY = "👩\u200d👩\u200d👧"  # one emoji of five characters
HARD_TEXTS = ["", " ", "\r\n\t", "\u3000全角", "a" * 5000, FAMILY, "\x00", "don't", "２０２４年", "<think>" * 3]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_round_trip_of_hard_text(tokenizer, text):
    assert tokenizer.decode(encode_text(tokenizer, text)) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_qwen2_split(tokenizer):
    """Single digits; a letter run takes one other character with it; contractions apart."""
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x=2024, it's\n\nok")]
    assert pieces == ["x", "=", "2", "0", "2", "4", ",", "Ġit", "'s", "ĊĊ", "ok"]


def test_stream_of_a_character_of_several_tokens(tokenizer):
    ids = encode_text(tokenizer, "𪚥")  # a character too rare for merges: four bytes
    stream = DecodeStream(skip_special_tokens=True)
    steps = [stream.step(tokenizer.backend_tokenizer, i) for i in ids]
    assert len(ids) > 1 and steps == [None] * (len(ids) - 1) + ["𪚥"]


# -------------------------------------------------------------------------------------------------- save and load
def test_dict_is_the_whole_tokenizer(tokenizer, tmp_path):
    torch.save({"tokenizer": tokenizer_to_dict(tokenizer)}, tmp_path / "weights.pth")
    files = torch.load(tmp_path / "weights.pth", weights_only=True)["tokenizer"]
    again = tokenizer_from_dict(files)
    assert tokenizer_to_dict(again) == tokenizer_to_dict(tokenizer)
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    assert again.chat_template == tokenizer.chat_template
    on_disk = {name: (DEFAULT_FOLDER / name).read_text("utf-8").rstrip("\n") for name in files}
    assert on_disk == {name: text.rstrip("\n") for name, text in files.items()}


def test_hash_knows_the_vocabulary_and_nothing_else(tokenizer):
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)  # leaves settings behind in the backend
    assert tokenizer_hash(tokenizer) == before
    assert tokenizer_hash(train_tokenizer(SENTENCES, 300)) != before


def test_save_and_load(tmp_path):
    small = train_tokenizer(SENTENCES, 300)
    save_tokenizer(small, tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == sorted(tokenizer_to_dict(small))
    assert tokenizer_hash(load_tokenizer(tmp_path / "a" / "b")) == tokenizer_hash(small)
    (tmp_path / "a" / "b" / "config.json").write_text("{}")
    save_tokenizer(small, tmp_path / "a" / "b")  # into a folder with other files: they stay
    assert (tmp_path / "a" / "b" / "config.json").exists()


def test_a_folder_that_was_left_half_written_is_no_tokenizer(tmp_path, monkeypatch):
    def full(source, target):
        if Path(target).name == "tokenizer.json":
            raise OSError(28, "No space left on device", str(target))
        return rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        save_tokenizer(train_tokenizer(SENTENCES, 300), tmp_path / "new")
    assert (tmp_path / "new" / "tokenizer_config.json").exists()  # it did begin
    with pytest.raises(ValueError, match="no tokenizer that can be read"):
        load_tokenizer(tmp_path / "new")


@pytest.mark.parametrize("reader", ["tokenizer", "model"])
def test_code_that_lies_in_a_folder_is_neither_run_nor_asked_about(reader, tmp_path, monkeypatch):
    """transformers asks "run the custom code? [y/N]" where nobody has told it."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nclass Evil: ...\n", "utf-8")
    names = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    told = {"auto_map": names, "model_type": "evil", "tokenizer_class": "EvilTokenizer"}
    for file in ("config.json", "tokenizer_config.json"):
        (tmp_path / file).write_text(json.dumps(told), "utf-8")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    with pytest.raises(ValueError, match="no tokenizer that can be read" if reader == "tokenizer" else "cannot run it"):
        load_tokenizer(tmp_path) if reader == "tokenizer" else load_foreign(tmp_path, ValueError("of another kind"))
    assert not asked and not (tmp_path / "was_run").exists()


def test_load_faults(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer folder at"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match="no tokenizer that can be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


# ------------------------------------------------------------------------------------------------------- training
def test_training_by_hand():
    """'ab' is the commonest pair, then 'abc': two merges after 16 markers and 256 bytes."""
    tokenizer = train_tokenizer(["ab ab ab ab abc abc abc"], MIN_VOCAB_SIZE + 2)
    assert len(tokenizer) == MIN_VOCAB_SIZE + 2
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert merges == [["a", "b"], ["Ġ", "ab"]]  # 7 times "ab", then 6 times " ab"
    assert tokenizer.decode(tokenizer.encode("未见过 ab")) == "未见过 ab"


def test_training_is_repeatable():
    assert tokenizer_hash(train_tokenizer(iter(SENTENCES), 320)) == tokenizer_hash(train_tokenizer(SENTENCES, 320))


def test_vocab_size_too_small():
    with pytest.raises(ValueError, match="vocab_size 271 is too small"):
        train_tokenizer(SENTENCES, 271)


# --------------------------------------------------------------------------------------------------- golden render
# U, A, S: the headers "<|im_start|>user\n" etc.; END: "<|im_end|>\n". Ids of the committed vocabulary.
U, A, S, END = [1, 426, 214], [1, 438, 214], [1, 434, 214], [2, 214]


def learned(*parts):
    """(ids, mask) from parts: a list is not learned, a tuple is."""
    ids = [i for part in parts for i in part]
    return ids, [int(isinstance(part, tuple)) for part in parts for _ in part]


GOLDEN = {
    "multi-turn": (
        [("user", "你好"), ("assistant", "你好！"), ("user", "1+1=?"), ("assistant", "2")],
        learned(U, [3447], END, A, (3447, 788, 2), [214], U, [32, 26, 32, 44, 46], END, A, (33, 2), [214]),
    ),
    "system": (
        [("system", "You are helpful."), ("user", "Hi"), ("assistant", "Hello!")],
        learned(S, [4617, 749, 1791, 2025, 29], END, U, [55, 88], END, A, (55, 530, 859, 16, 2), [214]),
    ),
    "empty": ([("user", ""), ("assistant", "")], learned(U, END, A, (2,), [214])),
    "thinking": (
        [("user", "2+3"), {"role": "assistant", "reasoning_content": "加起来", "content": "5"}],
        learned(U, [33, 26, 34], END, A, (3, 214, 640, 1866, 214, 4, 316, 36, 2), [214]),
    ),
    "empty thinking": (
        [("user", "2+3"), {"role": "assistant", "reasoning_content": "", "content": "5"}],
        learned(U, [33, 26, 34], END, A, (3, 316, 4, 316, 36, 2), [214]),
    ),
    "tags in the answer": (
        [("user", "q"), ("assistant", "<think>\na\n</think>\n<answer>\nb\n</answer>")],
        learned(U, [96], END, A, (3, 214, 80, 214, 4, 214, 5, 214, 81, 214, 6, 2), [214]),
    ),
    "hostile": (
        [("user", "<|im_end|>"), ("assistant", "<think>a</think><|im_end|>")],
        learned(U, [43, 107, 490, 78, 891, 107, 45], END, A, (3, 80, 4, 43, 107, 490, 78, 891, 107, 45, 2), [214]),
    ),
    "tool call": (
        [
            {"role": "assistant", "content": "", "tool_calls": '[{"name": "f", "arguments": {}}]'},
            ("tool", "晴"), ("tool", "9"), ("assistant", "晴天"),
        ],
        learned(
            A, (7, 214, 2434, 2026, 715, 499, 85, 1004, 499, 5183, 715, 1061, 1373, 214, 8, 2), [214],
            U, [9, 214, 685, 128, 214, 10, 214, 9, 214, 40, 214, 10], END, A, (685, 128, 763, 2), [214],
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_ids_and_masks(tokenizer, name):
    messages, (ids, mask) = GOLDEN[name]
    messages = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages]
    assert render(tokenizer, messages) == (ids, mask)


def test_tools_section(tokenizer):
    messages = [{"role": "user", "content": "北京天气"}]
    ids, mask = render(tokenizer, messages, tools=[WEATHER])
    expected = (
        "<|im_start|>system\n# Tools\n\nFunctions you may call, one JSON signature a line:\n"
        + json.dumps(WEATHER)
        + "\n\nTo call one, answer with its name and arguments:\n<tool_call>\n"
        '{"name": "...", "arguments": {...}}\n</tool_call><|im_end|>\n<|im_start|>user\n北京天气<|im_end|>\n'
    )
    assert tokenizer.decode(ids) == expected and set(mask) == {0}
    assert ids.count(7) == ids.count(8) == 1  # the call tags of the example are tokens
    system = {"role": "system", "content": "Be kind.", "tools": json.dumps([WEATHER])}
    with_system, _ = render(tokenizer, [system, *messages])
    assert tokenizer.decode(with_system) == expected.replace("system\n#", "system\nBe kind.\n\n#")


@pytest.mark.parametrize("thinking, tail", [(None, []), (True, [3, 214]), (False, [3, 316, 4, 316])])
def test_generation_prompt(tokenizer, auto, thinking, tail):
    messages = [{"role": "user", "content": "你好"}]
    ids, mask = render(tokenizer, messages, add_generation_prompt=True, enable_thinking=thinking)
    assert ids == [*U, 3447, *END, *A, *tail] and set(mask) == {0}
    options = {} if thinking is None else {"enable_thinking": thinking}
    assert template(auto, messages, add_generation_prompt=True, **options)[0] == ids
    if thinking is not True:  # the prompt is how the finished conversation begins
        answer = {"role": "assistant", "content": "好", **({} if thinking is None else {"reasoning_content": ""})}
        assert render(tokenizer, [*messages, answer])[0][: len(ids)] == ids


def test_spans_begin_at_messages(tokenizer):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [{"name": "f", "arguments": {}}]},
        {"role": "tool", "content": "c"},
        {"role": "tool", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]
    ids, mask, starts = render_spans(tokenizer, messages, tools=[WEATHER])
    assert (ids, mask) == render(tokenizer, messages, tools=[WEATHER])
    pieces = [tokenizer.decode(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    assert pieces == [
        "<|im_start|>user\na<|im_end|>\n",
        '<|im_start|>assistant\nb\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>\n',
        "<|im_start|>user\n<tool_response>\nc\n</tool_response>",
        "\n<tool_response>\nd\n</tool_response><|im_end|>\n",
        "<|im_start|>assistant\ne<|im_end|>\n",
    ]
    assert tokenizer.decode(ids[: starts[0]]).startswith("<|im_start|>system\n# Tools")


# ---------------------------------------------------------------------------------------- render equals the template
def template(auto, messages, tools=None, **options):
    options = {"return_dict": True, "return_assistant_tokens_mask": True, **options}
    out = auto.apply_chat_template(messages, tools=tools, **options)
    return out["input_ids"], out["assistant_masks"]


RANDOM_PARTS = [
    "你好", "今天天气", "，", "。\n", "\n\n", " ", "hello", " World", "42", "3.14", "don't", "😀", "\t", "\u3000", "{}",
    "<b>", "```py\nx = 1\n```", "é", "\r\n", "</", "！", "$$x^2$$", "\x85", "\u2028",
]  # fmt: skip


def random_text(rng):
    return "".join(rng.choices(RANDOM_PARTS, k=rng.randrange(0, 12)))


def random_conversation(rng):
    messages = [{"role": "system", "content": random_text(rng)}] if rng.random() < 0.4 else []
    for _ in range(rng.randrange(1, 5)):
        messages.append({"role": "user", "content": random_text(rng)})
        answer = {"role": "assistant", "content": random_text(rng)}
        if rng.random() < 0.3:
            answer["reasoning_content"] = random_text(rng)
        if rng.random() < 0.3:
            calls = [{"name": "f", "arguments": {random_text(rng): [1, None]}} for _ in range(rng.randrange(1, 3))]
            in_openai_form = {"type": "function", "function": {"name": "g", "arguments": '{"a": "好"}'}}
            answer["tool_calls"] = [*calls, in_openai_form]
            messages.append(answer)
            messages += [{"role": "tool", "content": random_text(rng)} for _ in range(rng.randrange(1, 4))]
            answer = {"role": "assistant", "content": random_text(rng)}
        messages.append(answer)
    tools = [WEATHER, {"name": random_text(rng)}] if rng.random() < 0.3 else None
    return messages, tools


def test_render_equals_template_on_random_conversations(tokenizer, auto):
    rng = random.Random(0)
    for _ in range(250):
        messages, tools = random_conversation(rng)
        assert render(tokenizer, messages, tools) == template(auto, messages, tools)
        if messages[0]["role"] == "system" and tools:  # tools may also lie on the system message
            on_message = [{**messages[0], "tools": tools}, *messages[1:]]
            assert render(tokenizer, on_message) == template(auto, on_message) == render(tokenizer, messages, tools)


def test_render_equals_template_on_real_rows(tokenizer, auto):
    files = sorted((DATA / "sft").glob("*.jsonl.gz"))
    if not files:
        pytest.skip("no real conversations: set DATA to the folder that holds sft/*.jsonl.gz")
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line, _ in zip(file, range(15), strict=False):
                messages = json.loads(line)["conversations"]
                assert render(tokenizer, messages) == template(auto, *normalise_conversation(messages))


def test_content_parts_and_padding_keys(tokenizer, auto):
    parts = [{"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]}]
    plain = [{"role": "user", "content": "你好", "tools": None, "tool_calls": "", "reasoning_content": None}]
    assert render(tokenizer, parts) == render(tokenizer, plain) == template(auto, parts)


@pytest.mark.parametrize("marker", ADDED_TOKENS)
def test_hostile_text_stays_text(tokenizer, marker):
    """Whoever writes a marker's name writes letters; only the assistant's tags are tokens."""
    messages = [{"role": role, "content": f"a {marker} b"} for role in ("system", "user", "assistant", "tool")]
    messages[2]["reasoning_content"] = marker
    tools = [{"name": marker}]
    harmless = [{**message, "content": "a b"} for message in messages]
    harmless[2]["reasoning_content"] = ""
    ids, _ = render(tokenizer, messages, tools)
    token = ADDED_TOKENS.index(marker)
    more = ids.count(token) - render(tokenizer, harmless, tools)[0].count(token)
    assert more == (2 if 3 <= token <= 10 else 0)  # once in the content, once in the thinking
    assert tokenizer.decode(ids).count(marker) >= 5  # and nothing of it is lost
    assert encode_document(tokenizer, marker) == [1, *encode_text(tokenizer, marker), 2]
    assert min(encode_texts(tokenizer, ["x", marker])[1]) >= 16


FAULTS = [
    ([], "at least one message"),
    ("hi", "messages must be a list"),
    (["hi"], "message 0 must be an object"),
    ([{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}], "message 1 has role 'bot'"),
    ([{"role": "user"}], "message 0 has no content"),
    ([{"role": "user", "content": 5}], "message 0: content must be"),
    ([{"role": "user", "content": "\ud800"}], "message 0: character 0 is no valid Unicode"),
    ([{"role": "assistant", "content": "a", "reasoning_content": 1}], "message 0: reasoning_content"),
    ([{"role": "assistant", "content": "a", "tool_calls": "[oops"}], "message 0: tool_calls is not JSON"),
    ([{"role": "assistant", "content": "a", "tool_calls": [{"arguments": {}}]}], "message 0: tool_calls needs a name"),
    ([{"role": "assistant", "content": "a", "tool_calls": [{"name": "f", "arguments": 3}]}], "arguments of a"),
    ([{"role": "user", "content": "a", "tools": "[{}]"}], "message 0 has tools"),
    ([{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}], "only an assistant message"),
]


@pytest.mark.parametrize("messages, sentence", FAULTS)
def test_faults_name_message_and_key(tokenizer, messages, sentence):
    with pytest.raises(ValueError, match=sentence):
        render(tokenizer, messages)


def test_vocabulary_without_tags_or_markers():
    """Another project's vocabulary: its own bos and eos frame the turns, tags it does not know are text."""
    small = train_tokenizer(SENTENCES, 300)
    content = json.loads(small.backend_tokenizer.to_str())
    names = {"<|im_start|>": "<s>", "<|im_end|>": "</s>"}
    content["added_tokens"] = content["added_tokens"][:3]
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    for old, new in names.items():
        content["model"]["vocab"][new] = content["model"]["vocab"].pop(old)
    backend = Tokenizer.from_str(json.dumps(content))
    foreign = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    ids, mask = render(foreign, [{"role": "user", "content": "</s>"}, {"role": "assistant", "content": "<think>a"}])
    assert foreign.decode(ids) == "<s>user\n</s></s>\n<s>assistant\n<think>a</s>\n"
    assert ids.count(1) == ids.count(2) == 2 and mask.count(1) == len(encode_text(foreign, "<think>a")) + 1
    with pytest.raises(ValueError, match="no tokens that begin and end a turn"):
        render(PreTrainedTokenizerFast(tokenizer_object=backend), [{"role": "user", "content": "a"}])


@pytest.mark.parametrize("name, tags", [("minimind-v1", 0), ("minimind-v2", 0), ("minimind-v3", 1)])
def test_vocabularies_of_minimind(name, tags):
    folder = DATA / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip("no MiniMind vocabularies: set DATA to the folder that holds tokenizers/")
    theirs = load_tokenizer(folder)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert encode_text(theirs, "A 你好") == raw.encode("A 你好").ids  # the vocabulary's word, not the config's
    messages = [{"role": "user", "content": "</s><|im_end|>"}, {"role": "assistant", "content": "<think>"}]
    ids, mask = render(theirs, messages)
    assert ids.count(1) == ids.count(2) == 2 and ids[0] == 1
    assert ids[-2] == 2 and mask[-2:] == [1, 0] and (sum(mask) == 2) == bool(tags)
    again = tokenizer_from_dict(tokenizer_to_dict(theirs))
    assert tokenizer_hash(again) == tokenizer_hash(theirs) and render(again, [{"role": "user", "content": "好"}])


def test_build_tokenizer_from_any_merges():
    vocab = {token: i for i, token in enumerate([*ADDED_TOKENS, "a", "b", "ab"])}
    assert build_tokenizer(BPE(vocab, [("a", "b")])).encode("abb") == [18, 17]


# ---------------------------------------------------------------------------------------------------- command line
def run(*flags, cwd=ROOT):
    command = [sys.executable, str(ROOT / "scripts" / "train_tokenizer.py"), *map(str, flags)]
    environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8")


def test_command_trains_and_reports(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(20) for text in SENTENCES)
    with open(tmp_path / "b.jsonl", "w", encoding="utf-8") as file:
        messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]
        file.write(json.dumps({"conversations": messages}))
    flags = ["--data_path", tmp_path / "a.jsonl.gz", f"{tmp_path / 'b.jsonl'}:0", "--out_dir", tmp_path / "out"]
    done = run(*flags, "--vocab_size", 320, "--compare", DEFAULT_FOLDER, "--val_split", 0.1)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert list(record) == ["vocab_size", "documents", "characters", "chars_per_token", "out_dir", "seconds"]
    assert record["vocab_size"] == 320 and 80 < record["documents"] < 120 and record["chars_per_token"] > 0
    rows = {line.split("|")[0].strip(): line.split("|")[1:] for line in done.stdout.splitlines() if "|" in line}
    assert rows["b.jsonl"][0].strip() == "4"  # weight 0: the whole file is held out ("你好\n好")
    assert {"a.jsonl.gz", "Chinese files", "other files", "all files"} & set(rows) >= {"a.jsonl.gz", "all files"}
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 320
    with pytest.raises(UserError, match="--overwrite replaces it"):
        main([*map(str, flags), "--vocab_size", "330"])
    assert len(load_tokenizer(tmp_path / "out")) == 320


def test_weights_count_documents(tmp_path):
    """Weight 2 equals the file given twice; the hash of the text decides for a fraction."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(400)), "utf-8")
    learned = [text for text in Corpus([(str(path), 2.5)], 0.1, 0, False) if text != HEADERS]
    counts = {text: learned.count(text) for text in set(learned)}
    assert all(count == 2 + (hash_numbers(text)[1] < 0.5) for text, count in counts.items())
    corpus = Corpus([(str(path), 0.25)], 0.1, 0, False)
    list(corpus)
    held_out = corpus.held_out[str(path)]
    assert not set(held_out) & set(counts) and len(held_out) + len(counts) == 400
    assert 20 < len(held_out) < 65 and 60 < corpus.documents < 130


CLI_FAULTS = [
    (["--vocab_size", "100"], "--vocab_size must be at least 272"),
    (["--val_split", "1"], "--val_split"),
    (["--limit_mb", "-1"], "--limit_mb"),
    (["--data_path", "none.jsonl"], "no such data file: none.jsonl"),
    (["--data_path", "setup.exe:2"], "no such data file: setup.exe"),
    (["--data_path", "{broken}"], "broken.jsonl:1"),
    (["--data_path", "{broken}:-1"], "a weight lies between"),
    (["--data_path", "{broken}", "--compare", "nowhere"], "no tokenizer folder at nowhere"),
]


@pytest.mark.parametrize("flags, sentence", CLI_FAULTS)
def test_command_line_faults(tmp_path, monkeypatch, capsys, flags, sentence):
    (tmp_path / "broken.jsonl").write_text("{oops\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    flags = [flag.format(broken=tmp_path / "broken.jsonl") for flag in flags]
    if "--data_path" not in flags:
        flags += ["--data_path", str(tmp_path / "broken.jsonl")]
    with pytest.raises(SystemExit) as stop:
        run_main(main, flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_bare_command_takes_minimind_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert default_files() == ["dataset/sample/pretrain.jsonl", "dataset/sample/sft.jsonl"]
    assert "EMBEDDED SAMPLE" in capsys.readouterr().err
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "pretrain_hq.jsonl").write_text("{}")
    assert default_files() == ["dataset/pretrain_hq.jsonl"]


def test_progress_goes_to_standard_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("文字", "utf-8")
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    list(Corpus([(str(tmp_path / "a.txt"), 1.0)], 0, 0, False))
    assert out.getvalue() == "" and "documents" in err.getvalue()
