"""Cutting and packing: no token is lost or doubled, turns stay whole, rows are full."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.pack import chat_items, item_lengths, pack, pack_texts, text_items

lengths_lists = st.lists(st.integers(2, 300), min_size=1, max_size=60)


@given(lengths_lists, st.integers(16, 64))
@settings(max_examples=200, deadline=None)
def test_text_items_learn_every_token_but_the_first_exactly_once(lengths, longest):
    items = text_items(np.array(lengths), longest)
    assert item_lengths(items).max() <= longest
    learned = [[] for _ in lengths]
    for document, prefix, start, end, learn_from in items:
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


def test_texts_that_do_not_fit_together_are_cut_finer():
    items, slots, offsets = pack_texts(np.full(1000, 300), 512)  # one of 300 a row would leave 41% empty
    share = item_lengths(items).sum() / (512 * (len(offsets) - 1))
    assert share > 0.97
    new = (items[:, 3] - items[:, 4]).sum()
    assert new == 1000 * 299


def test_a_conversation_that_fits_is_one_item():
    assert chat_items(np.array([40]), lambda i: [0, 20], 64).tolist() == [[0, 0, 0, 40, 0]]


def test_a_long_conversation_is_split_at_turns_with_the_last_exchange_as_context():
    # user 0-10, assistant 10-30, user 30-40, assistant 40-60; rows of 50
    items = chat_items(np.array([60]), lambda i: [0, 10, 30, 40], 50)
    assert items[0].tolist() == [0, 0, 0, 40, 0]
    document, prefix, start, end, learn_from = items[1]
    assert (end, learn_from) == (60, 40)
    assert start == 10 + 0 and prefix == 0 or prefix == 10  # the exchange before, as far as it fits
    assert prefix + end - start <= 50


def test_a_system_turn_is_repeated_in_the_next_row():
    # system 0-8, then exchanges of 10 + 10
    turns = [0, 8, 18, 28, 38, 48, 58]
    items = chat_items(np.array([68]), lambda i: turns, 50)
    assert len(items) == 2
    _, prefix, start, end, learn_from = items[1]
    assert prefix == 8 and start == 28 and learn_from == 48 and end == 68


def test_only_a_single_turn_longer_than_the_row_is_cut():
    items = chat_items(np.array([120]), lambda i: [0, 10, 90, 100], 50)
    assert item_lengths(items).max() <= 50
    learned = sorted(p for _, _, start, end, begin in items for p in range(max(start, begin), end))
    assert len(learned) == len(set(learned))
    assert set(range(90, 120)) <= set(learned)  # the turns after the long one are whole
    lost = set(range(120)) - set(learned)
    assert lost and min(lost) >= 10 and max(lost) < 90  # and what is missing is the long turn's


@given(st.lists(st.integers(3, 90), min_size=2, max_size=30), st.integers(32, 128))
@settings(max_examples=200, deadline=None)
def test_every_turn_that_fits_is_learned_whole_and_once(turn_lengths, longest):
    starts = np.cumsum([0] + turn_lengths)
    items = chat_items(starts[-1:], lambda i: starts[:-1], longest)
    assert item_lengths(items).max() <= longest
    learned = [p for _, _, start, end, begin in items for p in range(max(start, begin), end)]
    assert len(learned) == len(set(learned))
    for start, length in zip(starts, turn_lengths):
        if length <= longest:
            assert set(range(start, start + length)) <= set(learned)


def test_row_lengths_are_met_at_scale():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 512, 200_000)
    slots, offsets = pack(lengths, 512)
    assert lengths.sum() / (512 * (len(offsets) - 1)) > 0.97
    assert pytest.approx(slots.sum()) == lengths.sum()
