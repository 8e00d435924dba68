"""What the terminal says to a newcomer, in the language of the locale: the chat's first lines, the demo's own lines."""

import io
import re
import string
from pathlib import Path

import pytest
from stage import load

from chat import terminal
from chat.abilities import Abilities
from chat.words import CATALOGUE, Words
from common.errors import RunFailed
from common.words import LANGUAGES, language_here

ROOT = Path(__file__).resolve().parent.parent
DEMO = load("scripts/demo.py")


@pytest.fixture
def locale(monkeypatch):
    """locale(LANG="zh_CN.UTF-8") sets these variables, and removes the others that name a language."""

    def set_to(**variables):
        for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


# --------------------------------------------------------------------------------------------------------- catalogue
def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_every_sentence_stands_in_both_languages():
    for key, texts in CATALOGUE.items():
        assert len(texts) == len(LANGUAGES) and all(texts) and fields(texts[0]) == fields(texts[1]), key
        assert re.search("[一-鿿、]", texts[0]) and not re.search("[一-鿿]", texts[1]), key
    # The commands that the demo shows at its end are the same.
    commands = [re.findall(r"^  (.*?)  ", text, re.M) for text in CATALOGUE["demo_next"]]
    assert commands[0] == commands[1] and len(commands[0]) == 5


def test_every_sentence_is_said_and_every_stage_of_the_demo_has_one():
    code = "".join((ROOT / name).read_text("utf-8") for name in ("chat/terminal.py", "scripts/demo.py"))
    stages = {f"demo_{stage}" for stage in DEMO.commands("out", "--resume")}
    said = stages | set(re.findall(r'"(\w+)"', code))
    assert stages <= CATALOGUE.keys() and set(re.findall(r'say\("(\w+)"', code)) <= CATALOGUE.keys()
    assert CATALOGUE.keys() - said <= {"demo_talk"}


@pytest.mark.parametrize(
    ("variables", "language"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_TW"}, "zh"),
        ({"LANG": "en_US.UTF-8"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": ""}, "en"),
    ],
)
def test_the_locale_names_the_language(variables, language, locale):
    locale(**variables)
    assert language_here() == language


def test_where_no_variable_is_set_the_systems_own_name_counts(locale, monkeypatch):
    locale()
    for named, language in (("Chinese (Simplified)_China", "zh"), ("English_United States", "en"), (None, "en")):
        monkeypatch.setattr("locale.getlocale", lambda named=named: (named, "936"))
        assert language_here() == language


# --------------------------------------------------------------------------------------------------------------- chat
TAUGHT = Abilities("full_sft", True, False, False, True, 1, examples=("What colour is the sky?", "天空是什么颜色？"))


@pytest.mark.parametrize(
    ("can", "language", "lines"),
    [
        (TAUGHT, "zh", ["^学过：多轮对话", "没有学过：先思考再回答、工具", "例如：天空是什么颜色？$", "答错", "退出"]),
        (TAUGHT, "en", ["taught: conv", "not taught: thinking before", "colour is the sky.$", "wrong", "leave"]),
        (Abilities("pretrain", False, False, False, False, 0), "zh", ["基础模型", "退出"]),
        (Abilities(), "en", ["To leave: exit, quit, an empty line or Ctrl-D"]),  # nothing is known, nothing is claimed
        (Abilities("full_sft", True, examples=("天空？",)), "en", ["天空？$", "wrong", "leave"]),
    ],
)  # fmt: skip
def test_a_chat_begins_with_what_the_model_knows_and_how_to_leave(can, language, lines):
    told = terminal.introduction(can, Words(language))
    assert len(told) == len(lines)
    for text, pattern in zip(told, lines, strict=True):
        assert re.search(pattern, text), text


@pytest.mark.parametrize("leave", ["exit", "quit", " Quit ", "EXIT", "", None])
def test_ways_to_leave_a_chat(leave, monkeypatch):
    typed = [
        "one",
        *([] if leave is None else [leave, "never asked"]),
    ]  # None: the end of the input, as Ctrl-D gives it
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in typed)))
    assert list(terminal.typed(forget=None)) == ["one"]


def test_a_word_that_only_contains_exit_is_a_question(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("exit code?\nquit\n"))
    assert list(terminal.typed(forget=None)) == ["exit code?"]


# --------------------------------------------------------------------------------------------------------------- demo
def test_the_demo_speaks_the_locales_language_and_its_stages_english(locale, capfd):
    locale(LANG="zh_CN.UTF-8")
    assert DEMO.run("-c 'print(1); print({})'") == {} and capfd.readouterr().out.startswith("$ python -c")
    with pytest.raises(RunFailed, match="出错，退出码 3"):
        DEMO.run("-c 'import sys; sys.exit(3)'")
    locale(LANG="en_US.UTF-8")
    with pytest.raises(RunFailed, match="ended with exit code 3"):
        DEMO.run("-c 'import sys; sys.exit(3)'")
