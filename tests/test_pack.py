"""Cutting and packing: no token is lost or doubled, turns stay whole, rows are full."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import Items, chat_items, pack, pack_texts, text_items


def table(items: Items) -> list[list[int]]:
    """[[document, prefix, start, end, learn_from], ...]"""
    return np.stack([items.document, items.prefix, items.start, items.end, items.learn_from], axis=1).tolist()


lengths_lists = st.lists(st.integers(2, 300), min_size=1, max_size=60)


@given(lengths_lists, st.integers(16, 64))
@settings(max_examples=200, deadline=None)
def test_text_items_learn_every_token_but_the_first_exactly_once(lengths, longest):
    items = text_items(np.array(lengths), longest)
    assert items.lengths.max() <= longest
    learned = [[] for _ in lengths]
    for document, prefix, start, end, learn_from in table(items):
        assert prefix == 0 and learn_from == start + 1  # one token of context
        learned[document] += range(learn_from, end)
    assert learned == [list(range(1, n)) for n in lengths]


@given(lengths_lists, st.integers(300, 400))
@settings(max_examples=200, deadline=None)
def test_pack_places_every_item_once_and_no_row_overflows(lengths, row_length):
    slots, offsets = pack(np.array(lengths), row_length)
    assert sorted(slots) == sorted(lengths)
    rows = [slots[a:b].sum() for a, b in zip(offsets, offsets[1:])]
    assert min(rows) > 0 and max(rows) <= row_length
    assert offsets[0] == 0 and offsets[-1] == len(slots)


def test_pack_hand_worked():
    slots, offsets = pack(np.array([6, 5, 4, 3, 2]), 10)  # 6+4 and 5+3+2 fill two rows
    assert sorted(sorted(slots[a:b].tolist()) for a, b in zip(offsets, offsets[1:])) == [[2, 3, 5], [4, 6]]


def pieces(items):
    return np.bincount(items.document)


def test_texts_that_do_not_fit_together_are_cut_finer():
    items, slots, offsets = pack_texts(np.full(1000, 300), 512)  # one of 300 a row would leave 41% empty
    assert items.lengths.sum() / (512 * (len(offsets) - 1)) > 0.97
    assert (items.end - items.learn_from).sum() == 1000 * 299
    items, _, offsets = pack_texts(np.tile([300, 190, 22], 400), 512)
    assert pieces(items).max() == 1 and len(offsets) - 1 == 400


@pytest.mark.parametrize("lengths", [[100], [60] * 5, [500, 100], [400, 300, 200]])
def test_a_last_row_that_is_not_full_is_no_reason_to_cut(lengths):
    assert pieces(pack_texts(np.array(lengths), 512)[0]).max() == 1


def test_validation_cuts_only_what_is_longer_than_a_row():
    lengths = np.array([300] * 9 + [512, 513, 1024])
    items, _, offsets = pack_texts(lengths, 512, fill=False)
    assert pieces(items).tolist() == [1] * 10 + [2, 3]


S, U, A, T = range(4)  # roles


def chat(*turns):
    """(role, tokens), ... -> what chat_items asks of one conversation: (lengths, messages)."""
    roles, sizes = zip(*turns, strict=True)
    borders = np.cumsum([0, *sizes])
    return borders[-1:], lambda i: (borders[:-1], roles)


def test_a_conversation_that_fits_is_one_item():
    assert table(chat_items(*chat((U, 20), (A, 20)), 64)) == [[0, 0, 0, 40, 0]]


def test_a_long_conversation_is_split_after_answers_with_the_last_exchange_as_context():
    items = chat_items(*chat((U, 10), (A, 20), (U, 10), (A, 20)), 60)
    assert table(items) == [[0, 0, 0, 60, 0]]
    items = chat_items(*chat((U, 10), (A, 20), (U, 10), (A, 10), (U, 5), (A, 10)), 60)
    assert table(items) == [[0, 0, 0, 50, 0], [0, 0, 30, 65, 50]]  # the second exchange again, then the third
    items = chat_items(*chat((U, 20), (A, 30), (U, 10), (A, 20)), 50)
    assert table(items) == [[0, 0, 0, 50, 0], [0, 0, 50, 80, 50]]  # the exchange before does not fit beside it


def test_a_system_turn_is_repeated_in_the_next_row_and_no_other_first_message_is():
    exchanges = [(U, 10), (A, 10)] * 3
    items = chat_items(*chat((S, 8), *exchanges), 50)
    assert table(items) == [[0, 8, 8, 48, 8], [0, 8, 28, 68, 48]]
    items = chat_items(*chat(*exchanges), 45)
    assert table(items) == [[0, 0, 0, 40, 0], [0, 0, 20, 60, 40]]
    items = chat_items(*chat((S, 30), *exchanges), 45)  # too long to stand beside an exchange
    assert table(items) == [[0, 0, 30, 70, 30], [0, 0, 50, 90, 70]]


def test_a_tools_result_keeps_the_question_and_the_call_before_it():
    turns = (U, 10), (A, 10), (T, 15), (A, 10), (T, 15), (A, 10)
    items = chat_items(*chat(*turns), 60)
    assert table(items) == [[0, 0, 0, 45, 0], [0, 0, 45, 70, 45]]  # all before it does not fit: its result alone
    items = chat_items(*chat((S, 5), *turns[:4]), 45)
    assert table(items) == [[0, 5, 5, 25, 5], [0, 0, 5, 50, 25]]  # before the system turn


def test_a_question_is_cut_before_its_answer_and_only_an_answer_longer_than_the_row_is():
    items = chat_items(*chat((U, 40), (A, 30)), 50)
    assert table(items) == [[0, 0, 20, 70, 0]]
    items = chat_items(*chat((U, 10), (A, 80), (U, 10), (A, 20)), 50)
    assert table(items) == [[0, 0, 10, 60, 0], [0, 0, 90, 120, 90]]
    items = chat_items(*chat((U, 10), (A, 30), (U, 60)), 50)  # nobody answers the last question
    assert table(items) == [[0, 0, 0, 40, 0]]


conversations = st.lists(st.tuples(st.sampled_from([S, U, A, A, T]), st.integers(3, 90)), min_size=2, max_size=30)


@given(conversations.filter(lambda turns: any(role == A for role, _ in turns)), st.integers(32, 128))
@settings(max_examples=300, deadline=None)
def test_answers_are_learned_once_and_rows_begin_where_somebody_begins_to_speak(turns, longest):
    lengths, messages = chat(*turns)
    borders, roles = [*messages(0)[0].tolist(), int(lengths[0])], messages(0)[1]
    items = chat_items(lengths, messages, longest)
    assert items.lengths.max() <= longest
    learned = [p for _, _, start, end, begin in table(items) for p in range(max(start, begin), end)]
    assert len(learned) == len(set(learned))
    learned = set(learned)
    for role, start, end in zip(roles, borders, borders[1:]):
        if role == A:  # whole, or the beginning of what is longer than the row
            assert set(range(start, min(end, start + longest))) <= learned
    if lengths[0] <= longest:
        return
    for _, prefix, start, end, begin in table(items):
        assert prefix in (0, borders[1]) and (not prefix or roles[0] == S and start >= prefix)
        assert any(r == A and begin <= a < end for r, a in zip(roles, borders))  # each teaches something
        assert start in borders or end - start == longest  # cut only where question and answer fill the row
        assert end in borders or end - start == longest
        if begin > start > borders[1]:  # the context begins where the user began to speak
            assert roles[borders.index(start)] in (S, U)


def test_row_lengths_are_met_at_scale():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 512, 200_000)
    slots, offsets = pack(lengths, 512)
    assert lengths.sum() / (512 * (len(offsets) - 1)) > 0.97
    assert pytest.approx(slots.sum()) == lengths.sum()
