"""Sums by key: of tensors and numbers, and a copy on its way stays as it was."""

import pytest
import torch
from fgattn.runs.sums import ROOM, Sums


@pytest.mark.parametrize("turns", [1, 3])
def test_rows_are_kept_apart_and_kept(turns):
    """More rows than wait one by one, added to in turns; tensors of several sizes and types."""
    sums = Sums(3)
    assert not sums and sums.read() == {}
    for turn in range(turns):
        for key in range(ROOM + 7):
            sums.add((key, "x"), 0, torch.full((2, key % 3), 1.0, dtype=torch.float64), key)
            sums.add((key, "x"), 2, torch.tensor(0.5))
        if turn:
            sums.read()
    assert sums
    expected = {(key, "x"): [2.0 * turns * (key % 3), turns * key, 0.5 * turns] for key in range(ROOM + 7)}
    assert sums.read() == expected == sums.read()


def test_what_was_sent_stays_as_it_was():
    sums = Sums(2)
    sums.add("a", 0, torch.ones(3), 5)
    sums.send()
    sums.add("a", 0, torch.ones(1))
    sums.add("b", 1, torch.full((2,), 4.0))
    assert sums.arrived() == {"a": [3.0, 5.0]}
    sums.send()
    sums.add("c", 0, 1)
    assert sums.arrived() == {"a": [4.0, 5.0], "b": [0.0, 8.0]} == sums.arrived()
    assert sums.read() == {"a": [4.0, 5.0], "b": [0.0, 8.0], "c": [1.0, 0.0]}


def test_reading_takes_what_is_on_its_way():
    sums = Sums(1)
    sums.add("a", 0, torch.ones(3))
    sums.send()
    sums.add("a", 0, torch.ones(2))
    assert sums.read() == {"a": [5.0]} == sums.arrived()
    sums.send()
    assert sums.arrived() == {"a": [5.0]}


def test_what_was_read_does_not_change():
    sums = Sums(1)
    sums.add("a", 0, 1)
    before = sums.read()
    sums.add("a", 0, 1)
    assert sums.read() == {"a": [2.0]} and before == {"a": [1.0]}
