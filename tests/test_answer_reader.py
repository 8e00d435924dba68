"""Thinking and tool calls told apart from text, however the answer is cut into pieces."""

import pytest

from inference.stream_text import AnswerReader, parse_call

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TEXTS = {
    f"Well.\n{CALL}\n{CALL}": [("content", "Well."), "add", "add"],
    f"<think>\nHm <b>\n</think>\n\nSo\n{CALL} done\n":
        [("reasoning", "Hm <b>"), ("content", "So"), "add", ("content", "done")],
    "a <tool_call>{not json}</tool_call> b": [("content", "a <tool_call>{not json}</tool_call> b")],
    '<tool_call>{"name": "drop", "arguments": {}}</tool_call>':
        [("content", '<tool_call>{"name": "drop", "arguments": {}}</tool_call>')],
    f"</tool_call> x {CALL}": [("content", "</tool_call> x"), "add"],
    "no end <tool_call>\n{": [("content", "no end <tool_call>\n{")],
    "1 < 2 <tool": [("content", "1 < 2 <tool")],
    "  blanks stay \n": [("content", "  blanks stay \n")],
    "<think>never closed": [("reasoning", "never closed")],
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_any_cut_of_an_answer_reads_the_same(text):
    def read(pieces):
        reader, parts = AnswerReader(names={"add"}), []
        for i, piece in enumerate(pieces):
            for kind, part in reader.feed(piece, final=i + 1 == len(pieces)):
                if kind != "call" and parts and parts[-1][0] == kind:
                    parts[-1] = (kind, parts[-1][1] + part)
                else:
                    parts.append(part.name if kind == "call" else (kind, part))
        return parts

    assert read([text]) == TEXTS[text] == read([*text, ""])
    for cut in range(len(text)):
        assert read([text[:cut], text[cut:]]) == TEXTS[text]


def test_what_is_a_call():
    names = {"f"}
    assert parse_call('{"name": "f"}', names).arguments == "{}"
    assert parse_call('{"name": "f", "arguments": "{\\"x\\": \\"好\\"}"}', names).arguments == '{"x": "好"}'
    no_calls = (
        "", "[]", "1", '"f"', '{"name": ["f"]}', '{"name": "f", "arguments": [1]}', '{"name": "g"}', "[" * 99999,
        '{"name": "f", "arguments": {"x": "\\ud800"}}', '{"name": "f", "arguments": "x"}',
    )  # fmt: skip
    for text in no_calls:
        assert parse_call(text, names) is None
