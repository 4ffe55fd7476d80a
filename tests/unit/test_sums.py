"""Sums by key: they grow, and a copy on its way does not."""

import torch
from fgattn.runs.sums import ROOM, Sums

CPU = torch.device("cpu")


def test_rows_are_kept_apart_and_kept():
    """More rows than there was room for at first, added to in turns."""
    sums = Sums(2)
    assert not sums and sums.read() == {}
    for turn in (1.0, 2.0):
        for key in range(3 * ROOM):
            row = sums.row((key, "x"), CPU)
            row[0] += turn
            row[1] += key
    assert sums and sums.read() == {(key, "x"): [3.0, 2.0 * key] for key in range(3 * ROOM)}


def test_what_was_sent_stays_as_it_was():
    sums = Sums(1)
    sums.row("a", CPU)[0] += 1
    keys, values = sums.send()
    sums.row("a", CPU)[0] += 1
    sums.row("b", CPU)[0] += 5
    assert (keys, values.tolist()) == (["a"], [[1.0]]) and sums.read() == {"a": [2.0], "b": [5.0]}
