"""Files of prompts, as every program reads them."""

import gzip
import json

import pytest

from common.errors import UserError
from data.prompts import as_messages, read_prompts

USER, REPLY = {"role": "user", "content": "问"}, {"role": "assistant", "content": "旧"}
TOLD = {"role": "system", "content": "短"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_prompts_of_every_shape(tmp_path):
    rows = [{"prompt": "甲"}, {"question": "乙", "answer": "x"}, {"conversations": [USER, REPLY, USER, REPLY]},
            {"messages": [USER], "system": "短"}]  # fmt: skip
    path = write(tmp_path / "a.jsonl", rows)
    found = read_prompts(path)
    assert [row["prompt"] for row in found] == ["甲", "乙", [USER, REPLY, USER], [TOLD, USER]]
    assert [row["line"] for row in found] == [1, 2, 3, 4] and found[1]["answer"] == "x"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read_prompts(tmp_path / "a.jsonl.gz") == found


def test_a_text_file_has_one_prompt_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\ufeff甲 \n\n乙\u2028丙\n", encoding="utf-8")  # only a line feed ends a line
    assert [(row["prompt"], row["line"]) for row in read_prompts(path)] == [("甲", 1), ("乙\u2028丙", 3)]
    path.write_text("\n \n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, 'no text under "prompt"'),
        ({"prompt": "x \ud83d y"}, "surrogates"),
        ({"messages": [TOLD]}, "the conversation asks nothing"),
        ({"messages": [TOLD, USER], "system": "长"}, "has content of its own"),
    ],
)
def test_a_row_that_is_no_prompt_is_one_line(row, said, tmp_path):
    with pytest.raises(UserError, match=rf"a\.jsonl:1: .*{said}"):
        read_prompts(write(tmp_path / "a.jsonl", [row]))


def test_a_prompt_as_messages():
    assert as_messages("问") == [USER] == as_messages([USER], "")
    assert as_messages("问", "短") == [TOLD, USER] == as_messages([TOLD, USER], "长")
