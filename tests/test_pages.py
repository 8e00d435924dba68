"""The pages that look inside, watch runs and show data; their words; and what the chat knows of a model."""

import json
import re
import string
import time
from pathlib import Path

import numpy as np
import pytest
import stage
from page import clean, open_page
from test_web_demo import StubApi

from chat import conversations, sources
from chat.abilities import abilities
from chat.models import found_models
from cleaning.preview import preview
from common.errors import UserError
from common.words import LANGUAGES
from data.rows import packed_splits
from data.taught import taught
from data.token_cache import tokenised
from inference.engine import Engine
from model.tokenizer import load_tokenizer
from model.weights import load_model
from model.weights_file import read_header
from pages import charts
from pages.faults import PATTERNS, explained
from pages.frame import escaped
from pages.words import CATALOGUE, Words

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "![x](http://127.0.0.1:9/x.png) <img src=x onerror=alert(1)> [l](http://127.0.0.1:9) $x$ **b**"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------------------------------------ the words
def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_the_catalogue_is_complete_in_both_languages():
    for key, texts in CATALOGUE.items():
        assert len(texts) == len(LANGUAGES) and all(texts), key
        assert fields(texts[0]) == fields(texts[1]), key
        # Names of techniques are the same in both; no English word is left for Chinese readers else.
        assert re.search("[一-鿿]", texts[0]) or key in ("v_tokens", "v_lora", "v_dpo", "token", "speed"), key
        assert not re.search("[一-鿿]", texts[1]), key
    parts = [part for name in ("chat", "look", "watch") for part in getattr(
        __import__(f"pages.words_{name}", fromlist=["x"]), name.upper())]  # fmt: skip
    assert len(parts) == len(CATALOGUE)  # no key stands in two of the files


def test_every_word_is_used_and_every_used_word_is_there():
    code = {path: path.read_text("utf-8") for path in (ROOT / "pages").glob("*.py")}
    code = "\n".join(text for path, text in code.items() if not path.name.startswith("words_"))
    said = set(re.findall(r'say\("(\w+)"', code))
    assert said <= CATALOGUE.keys()
    families = ("fault_", "status_", "is_", "by_", "form_")  # keys that are put together
    quoted = set(re.findall(r'"(\w+)"', code)) | {f"{view}_help" for view in re.findall(r'"(v_\w+)"', code)}
    quoted |= {f"{key}_of" for key in quoted}
    assert not [key for key in CATALOGUE if key not in quoted and not key.startswith(families)]
    assert {key.removeprefix("fault_") for key in CATALOGUE if key.startswith("fault_") and key != "fault_in_run"} == {
        *PATTERNS, "other"}  # fmt: skip


@pytest.mark.parametrize(
    ("message", "key"),
    [
        ("the prompt has 70 tokens, which leaves no room in the model's context of 64", "too_long"),
        ("the text has 900 tokens, and 512 at most can be looked at; take a part of it", "text_too_long"),
        ("cannot reach http://127.0.0.1:9/v1: Connection refused", "unreachable"),
        ("http://127.0.0.1:9/v1 refuses: no key", "refused"),
        ("http://127.0.0.1:9 does not answer as OpenAI's API does; does it end in /v1?", "no_api"),
        ("out/lora/x_32.pth is an adapter for the weights out/y.pth, which are not there; load them", "adapter"),
        ("out/full_sft_32.pth cannot be read as weights: bad", "weights"),
        ("out/full_sft_32.pth comes without a tokenizer; name the folder", "tokenizer"),
        ("a.jsonl:3: not JSON", "file_line"),
        ("this JSON schema cannot be held: nothing matches it", "form"),
        ("something else", "other"),
    ],
)
def test_an_error_has_a_sentence_in_each_language(message, key):
    found, values = explained(ValueError(message))
    assert found == key
    for language in LANGUAGES:
        assert fields(CATALOGUE[f"fault_{key}"][LANGUAGES.index(language)]) <= values.keys()
        assert Words(language)(f"fault_{key}", **values)


def test_what_a_model_writes_stays_text():
    html = charts.coloured([HOSTILE], ["red"], ['"><script>'])
    assert "<img" not in html and "<script" not in html and "&lt;img" in html
    assert not re.search(r"(?<!\\)[\[\]<>$*!]", escaped(HOSTILE))


# ---------------------------------------------------------------------------------------- what is known of a model
def test_a_record_tells_what_the_data_taught(tmp_path):
    tokenizer = load_tokenizer()
    rows = [{"role": "user", "content": "一加一等于几？"}, {"role": "assistant", "content": "二。"}]
    thinks = [*rows[:1], {"role": "assistant", "content": "二。", "reasoning_content": "数一数"}]
    chats = [rows * 3] * 2 + [thinks] * 3 + [rows] * 5
    chats = [[{**m, "content": m["content"] + str(i)} for m in chat] for i, chat in enumerate(chats)]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"conversations": c}) + "\n" for c in chats))
    cache = tokenised(path, "chat", tokenizer, tmp_path / "cache", workers=1)
    found = taught(packed_splits([cache], "chat", 128, 0, 0)[0], tokenizer)
    assert found["turns"] == {"1": 0.8, "3": 0.2} and found["thinking"] == 0.3 and found["tools"] == 0
    assert found["documents"] == 10 and found["examples"][0] == "一加一等于几？0" and len(found["examples"]) == 6
    can = abilities({"stage": "full_sft", "taught": {"full_sft": found}})
    assert (can.thinking, can.tools, can.several_turns, can.history) == (True, False, True, 2)
    assert can.examples == tuple(found["examples"])


def test_a_stage_writes_what_it_taught_and_the_next_one_keeps_it(tmp_path):
    base = [*stage.TINY, "--max_steps", "1", "--val_split", "0", "--from_weight", "none", "--out_dir", str(tmp_path)]
    chats = stage.write_chats(tmp_path / "chats.jsonl")
    stage.load("3-full_sft.py").main([*base, "--data_path", str(chats)])
    told = read_header(tmp_path / "full_sft_32.pth")["record"]["taught"]["full_sft"]
    assert told["turns"] == {"1": 0.25, "2": 0.25, "3": 0.25, "4": 0.25} and told["examples"]
    pairs = stage.write_pairs(tmp_path / "pairs.jsonl")
    flags = [*stage.SHORT, "--max_steps", "1", "--val_split", "0", "--data_path", str(pairs),
             "--out_dir", str(tmp_path), "--from_weight", str(tmp_path / "full_sft_32.pth")]  # fmt: skip
    stage.load("5-dpo_train.py").main(flags)
    record = read_header(tmp_path / "dpo_32.pth")["record"]
    assert record["taught"] == {"full_sft": told} and abilities(record).history == 3


@pytest.mark.parametrize(
    ("record", "chats", "thinking", "history"),
    [
        ({}, None, None, 4), ({"stage": "pretrain"}, False, False, 0), ({"stage": "full_sft"}, True, None, 4),
        ({"stage": "reason"}, True, True, 4), ({"stage": 3, "taught": [1]}, None, None, 4),
        ({"stage": "grpo", "recipe": {"temperature": 1.0}}, True, True, 4),
        ({"stage": "dpo", "taught": {"full_sft": {"kind": "chat", "turns": {"1": 0.93, "2": 0.07}}}}, True, False, 0),
    ],
)  # fmt: skip
def test_abilities_by_record(record, chats, thinking, history):
    can = abilities(record)
    assert (can.chats, can.thinking, can.history) == (chats, thinking, history)
    assert can.sampling == ((1.0, 1.0) if record.get("recipe") else (0.85, 0.85))


def test_counts_and_broken_characters(tmp_path):
    engine = Engine(*load_model(stage.chat_weights(tmp_path, seed=3))[:2])
    usage, settings = sources.Usage(), sources.Settings(max_tokens=40, temperature=1.5, seed=2)
    text = "".join(sources.Local(engine).continued("春天", settings, usage))
    assert "\ufffd" not in text and usage.written == 40 and usage.ended == "length" and usage.per_second > 0
    assert usage.read == len(engine.encode("春天"))
    assert usage.whole("一\ufffd二\ufffd") == "一二" and usage.broken >= 2
    with StubApi(lambda request: "一\ufffd") as stub:
        usage = sources.Usage()
        said = list(sources.Remote(stub.address, "", "stub").stream([{"role": "user", "content": "x"}],
                                                                    sources.Settings(), usage))  # fmt: skip
    assert "".join(text for _, text in said) == "一" and usage.broken == 1


def test_chats_are_read_back_and_other_files_refused():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "earlier": ["c"]}]
    raw = sources.exported(messages, "s").encode()
    assert conversations.imported(raw) == ([messages[0], {"role": "assistant", "content": "b"}], "s")
    assert conversations.asked_again(messages) == (messages[:1], ["c", "b"])
    assert conversations.edited(messages, 0, "z") == [{"role": "user", "content": "z"}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": 3}}]}
    for bad in ("", "[]", "{}", "3", '[{"role": "root", "content": "x"}]', "[" * 9999, json.dumps([messages[0], call]),
                '{"messages": [{"role": "user", "content": 3}]}', '[{"role": "system", "content": "x"}]'):  # fmt: skip
        with pytest.raises(ValueError, match="not a chat"):
            conversations.imported(bad.encode())


def test_models_are_offered_in_the_order_of_use(tmp_path):
    for name in ("pretrain_32.pth", "lora/x_32.pth", "full_sft_32.pth", "full_sft_32_resume.pth"):
        path = stage.chat_weights((tmp_path / name).parent, name=Path(name).name)
        time.sleep(0.01)
    assert path.exists() and [p.name for p in found_models(tmp_path)] == [
        "full_sft_32.pth", "x_32.pth", "pretrain_32.pth"]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- look inside
LOOK = {"look_text as_question": "1+1=?", "look_text as_text": "春天来了"}


def test_each_view_draws_a_model(here):
    stage.chat_weights(here / "out", seed=1)
    stage.chat_weights(here / "out", seed=2, name="dpo_32.pth")
    app = open_page("look", "en", **LOOK)
    for view in ("v_tokens", "v_next", "v_attention", "v_layers", "v_space", "v_two"):
        app.segmented_control("view").set_value(view).run()
        assert not clean(app).error and app.title[0].value == "Look inside"


def test_rivals_are_the_models_own_and_what_if_goes_on(here):
    stage.chat_weights(here / "out", seed=1)
    app = open_page("look", "en", view="v_next", **LOOK)
    app.pills("next place").set_value(2).run()
    app.pills("what if 2").set_value(1).run()
    assert clean(app).text[-1].value.count("【") == 1
    app.slider("look temperature").set_value(0.0).run()
    assert not clean(app).error


def test_experts_of_a_mixture(here):
    stage.chat_weights(here / "out", use_moe=True)
    app = open_page("look", "en", view="v_experts", **LOOK)
    assert not app.info and not app.error
    stage.chat_weights(here / "out")
    assert "dense" in open_page("look", "en", view="v_experts", **LOOK).info[0].value


def test_a_preference_pair_and_an_adapter(here):
    base = stage.chat_weights(here / "out", seed=1)
    stage.chat_weights(here / "out", seed=2, name="dpo_32.pth")
    pair = {"pair question": "1+1=?", "chosen": "2", "rejected": "3"}
    app = open_page("look", "en", view="v_dpo", **pair)
    assert re.fullmatch(r"[+-]\d+\.\d\d", app.metric[0].value)
    flags = [*stage.SHORT, "--from_weight", str(base), "--data_path", str(stage.write_chats(here / "c.jsonl", 8)),
             "--max_steps", "1", "--val_split", "0", "--out_dir", "out", "--save_weight", "x"]  # fmt: skip
    stage.load("4-lora_sft.py").main(flags)
    app = open_page("look", "en", view="v_lora")
    assert not app.info and not app.error and len(app.selectbox("adapter").options) == 1


def test_a_text_too_long_and_none_are_said(here):
    stage.chat_weights(here / "out", max_seq_len=64)
    app = open_page("look", "zh", view="v_tokens", **{"look_text as_question": "很长" * 100})
    assert "个 token" in app.error[0].value
    app.text_area("look_text as_question").set_value(" ").run()
    assert "还没有文字" in app.error[0].value


# -------------------------------------------------------------------------------------------------------------- watch
def write_run(folder, name, steps=5, loss=3.0, end=None, **settings):
    folder.mkdir(exist_ok=True)
    rows = [{"step": i, "tokens": 100, "seconds": 0.5 * i, "lr": 1e-3, "loss": loss / i} for i in range(1, steps + 1)]
    rows.append({"step": steps, "val_loss": 2.5, "val_bits_per_byte": 1.0})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    note = {"stage": "pretrain", "steps": 9, "resume": "python 1-pretrain.py --resume", "folder": "/x",
            "settings": {"seed": 1} | settings, "end": end}  # fmt: skip
    (folder / f"{name}_run.json").write_text(json.dumps(note))


def test_runs_are_listed_compared_and_named_where_they_are_broken(here):
    write_run(here / "out", "a_32", end={"how": "failed", "why": "the disk is full", "result": None}, seq_len=64)
    write_run(here / "out", "b_32", end={"how": "stopped", "why": "Ctrl-C", "result": None}, seq_len=128)
    samples = {"step": 5, "prompt": "p", "text": HOSTILE}, {"step": 1, "prompt": "1+1=?", "text": "2", "reward": 1.2,
                                                            "answer": "2"}  # fmt: skip
    (here / "out" / "a_32_samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    exam = {"time": "2026-01-02T03:04:05Z", "data_dir": "x/exam", "split": "val", "format": "text", "shots": 0, "n": 8,
            "accuracy_micro": 0.5, "interval": [0.2, 0.8], "weights": "out/a_32.pth"}  # fmt: skip
    (here / "out" / "exams.jsonl").write_text(json.dumps(exam) + "\nno exam\n")
    (here / "out" / "bad.jsonl").write_text('{"question": "x"}\n')
    with open(here / "out" / "b_32.jsonl", "a") as file:
        file.write("no line of a log\n")
    app = open_page("watch", "en")
    table = app.dataframe[0].value
    assert sorted(table["Run"]) == ["a_32", "b_32"] and set(table["Step"]) == {"5 / 9"}
    app.multiselect("runs in out").set_value([str(here / "out" / "a_32.jsonl").removeprefix(f"{here}/"),
                                              "out/b_32.jsonl"]).run()  # fmt: skip
    told = " ".join(text.value for text in clean(app).text)
    assert "failed at step 5. Why: the disk is full" in told and "stopped at step 5. Why: Ctrl-C" in told
    written, rewarded = (e.proto.body for e in app.get("html") if 'class="told"' in e.proto.body)
    assert "<img" not in written + rewarded and "onerror=alert(1)&gt;" in written and "1.2</td>" in rewarded  # as text
    assert "Right answer: 2" in told and app.subheader[-1].value == "Exams"
    assert "b_32.jsonl:7: not a line of a training log" in told and "bad.jsonl: is not the log" in told
    assert [code.value for code in app.code] == ["python 1-pretrain.py --resume"] * 2
    assert list(app.dataframe[1].value["Setting"]) == ["seq_len"]
    for axis in ("tokens", "seconds"):
        app.radio("axis").set_value(axis).run()
        clean(app)


def test_a_run_is_followed_while_it_grows(here):
    write_run(here / "out", "a_32", steps=3)
    app = open_page("watch", "zh")
    assert list(app.dataframe[0].value["步"]) == ["3 / 9"] and "中断" in app.dataframe[0].value["状态"][0]
    with open(here / "out" / "a_32.jsonl", "a") as file:
        file.write(json.dumps({"step": 4, "tokens": 9, "seconds": 9.0, "lr": 1.0, "loss": 1.0}) + "\n")
    assert list(clean(app.run()).dataframe[0].value["步"]) == ["4 / 9"]


def test_nothing_to_watch_is_said(here):
    assert "没有 out" in open_page("watch", "zh").error[0].value
    (here / "out").mkdir()
    assert "make demo" in open_page("watch", "en").info[0].value


# --------------------------------------------------------------------------------------------------------------- data
def test_a_preview_is_what_training_learns(tmp_path):
    tokenizer, path = load_tokenizer(), stage.write_chats(tmp_path / "c.jsonl")
    found = preview(path, tokenizer, 64)
    cache = tokenised(path, "chat", tokenizer, tmp_path / "cache", workers=1)
    rows = packed_splits([cache], "chat", 64, 0, 0)[0]
    assert found.n_packed == len(rows) and found.real == pytest.approx(rows.real_token_share())
    assert found.cut == int((np.bincount(rows.items.document) > 1).sum()) > 0
    assert found.rows[1].ids == cache.tokens[cache.offsets[1] : cache.offsets[2]].tolist()
    assert found.rows[1].learned == cache.learn[cache.offsets[1] : cache.offsets[2]].tolist()
    assert all(sum(lengths) <= 64 for lengths in found.packed)
    texts = preview(stage.write_texts(tmp_path / "t.jsonl"), tokenizer, 64)
    assert texts.kind == "text" and texts.rows[0].learned == [0] + [1] * (len(texts.rows[0].ids) - 1)
    pairs = preview(stage.write_pairs(tmp_path / "p.jsonl"), tokenizer, 64)
    assert pairs.kind == "pair" and pairs.rows[0].line == pairs.rows[1].line == 1
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    assert [line for line, _ in preview(tmp_path / "b.jsonl", tokenizer, 64).bad] == [2]
    with pytest.raises(UserError, match="at least 8"):
        preview(path, tokenizer, 4)


def test_a_file_is_shown_with_its_report(here):
    paths = [getattr(stage, f"write_{kind}")(here / f"{kind}.jsonl") for kind in ("texts", "chats", "pairs")]
    app = open_page("data", "en", **{"data file": "", "data path": str(paths[0])})
    for path in paths:
        app.text_input("data path").set_value(str(path)).run()
        assert not clean(app).error and app.metric[0].value in ("60", "40") and len(app.subheader) == 3


def test_files_that_are_none_are_said(here):
    app = open_page("data", **{"data file": "", "data path": "missing.jsonl"})
    assert "没有 missing" in app.error[0].value
    (here / "bad.jsonl").write_text("no json\n")
    app.text_input("data path").set_value("bad.jsonl").run()
    assert "第 1 行" in app.error[0].value
