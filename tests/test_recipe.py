"""The comparison with MiniMind's recipe: its rows, and how a time is read off a curve. (Its runs take hours.)"""

import math

import numpy as np
import pytest

from benchmarks.padded import CUT, padded_rows
from benchmarks.recipe import when
from data.rows import IGNORED


def test_a_document_is_cut_or_padded():
    ids, labels = padded_rows([np.arange(3, 8), np.arange(1000)])
    assert ids.shape == labels.shape == (2, CUT)
    assert ids[0, :5].tolist() == labels[0, :5].tolist() == [3, 4, 5, 6, 7]
    assert not ids[0, 5:].any() and (labels[0, 5:] == IGNORED).all()
    assert ids[1].tolist() == labels[1].tolist() == list(range(CUT))


def test_the_time_to_a_figure_lies_between_the_points_around_it():
    found = {"steps": 100, "cpu_seconds": 50.0, "curve": [[50, 3.0], [100, 2.0]]}
    assert when(found, 3.5) == 25.0  # by the first point at the latest
    assert when(found, 2.25) == pytest.approx(43.75)
    assert when(found, 1.9) == math.inf
