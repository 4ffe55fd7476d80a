"""Settings: what is refused, and that the refusal helps."""

import copy
import json
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from fgattn import InvalidArgument, Settings, TokenLayout, Unsupported
from fgattn.settings import TILE_KEYS, TILE_QUERIES, Policy, parse_blocks, ranges
from hypothesis import given
from hypothesis import strategies as st

NUMBER = "a finite number of at least 0"
WHOLE = "a whole number from 0 to 1000000000"
POSITIVE = "a whole number from 1 to 1000000000"
SET = "a frozenset of whole numbers from 0 to 9999"
ROWS = "16, 32, 64, 128"
SLICES = "1, 2, 4, 8, 16, 32, 64, 128"
RISING = 'block numbers and rising ranges such as "0, 1, 38-39"'


def message(what, got, allowed, remedy):
    return f"{what}: got {got!r}; allowed: {allowed}. {remedy}"


@pytest.mark.parametrize(
    ("kind", "what", "got", "allowed", "remedy"),
    [
        (Settings, "threshold", -0.1, NUMBER, "1.0 is a good start; 0 keeps everything."),
        (Settings, "threshold", math.nan, NUMBER, "1.0 is a good start; 0 keeps everything."),
        (Settings, "threshold", math.inf, NUMBER, "1.0 is a good start; 0 keeps everything."),
        (Settings, "threshold", "1.0", NUMBER, "1.0 is a good start; 0 keeps everything."),
        (Settings, "threshold", None, NUMBER, "1.0 is a good start; 0 keeps everything."),
        (Settings, "threshold", True, NUMBER, "1.0 is a good start; 0 keeps everything."),
        (Settings, "tile_queries", 0, ROWS, "128 is the fastest."),
        (Settings, "tile_queries", 48, ROWS, "128 is the fastest."),
        (Settings, "tile_queries", 256, ROWS, "128 is the fastest."),
        (Settings, "tile_queries", "64", ROWS, "128 is the fastest."),
        (Settings, "tile_queries", 64.0, ROWS, "128 is the fastest."),
        (Settings, "tile_keys", 0, SLICES, "16 is a good start."),
        (Settings, "tile_keys", 3, SLICES, "16 is a good start."),
        (Settings, "tile_keys", True, SLICES, "16 is a good start."),
        (Settings, "tile_keys", 1.0, SLICES, "16 is a good start."),
        (Settings, "order", "morton", "cells, raster, hilbert", "Use cells for video."),
        (Settings, "order", None, "cells, raster, hilbert", "Use cells for video."),
        (Settings, "tail", 1, "True or False", "Pass a boolean."),
        (Settings, "tail", "on", "True or False", "Pass a boolean."),
        (Policy, "warmup_steps", -1, WHOLE, "Use 0 for none."),
        (Policy, "warmup_steps", 10**9 + 1, WHOLE, "Use 0 for none."),
        (Policy, "reuse_steps", 10**30, POSITIVE, "Use 1 for a fresh plan in every call."),
        (Policy, "warmup_steps", 0.5, WHOLE, "Use 0 for none."),
        (Policy, "final_dense_steps", True, WHOLE, "Use 0 for none."),
        (Policy, "min_tokens", "4096", WHOLE, "Use 0 for none."),
        (Policy, "reuse_memory_mb", -1, WHOLE, "Use 0 for none."),
        (Policy, "reuse_memory_mb", 1.5, WHOLE, "Use 0 for none."),
        (Policy, "reuse_steps", 0, POSITIVE, "Use 1 for a fresh plan in every call."),
        (Policy, "reuse_steps", -3, POSITIVE, "Use 1 for a fresh plan in every call."),
        (Policy, "reuse_steps", 2.0, POSITIVE, "Use 1 for a fresh plan in every call."),
        (Policy, "reuse_steps", True, POSITIVE, "Use 1 for a fresh plan in every call."),
        (Policy, "reuse_steps", None, POSITIVE, "Use 1 for a fresh plan in every call."),
        (Policy, "dense_blocks", "0, 1", SET, "Use parse_blocks for text."),
        (Policy, "dense_blocks", [0, 1], SET, "Use parse_blocks for text."),
        (Policy, "dense_blocks", frozenset({"0"}), SET, "Use parse_blocks for text."),
        (Policy, "dense_blocks", frozenset({-1}), SET, "Use parse_blocks for text."),
        (Policy, "dense_blocks", frozenset({10_000}), SET, "Use parse_blocks for text."),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else str(x)[:24],
)
def test_bad_value_is_named(kind, what, got, allowed, remedy):
    """The message is all that a user of the node sees: what, got, allowed, remedy."""
    with pytest.raises(InvalidArgument) as caught:
        kind(**{what: got})
    assert str(caught.value) == message(what, got, allowed, remedy)
    assert isinstance(caught.value, ValueError)  # callers that know nothing of us still catch it


@pytest.mark.parametrize(
    ("name", "value"),
    [("threshold", 10**400), ("threshold", -(10**5000)), ("threshold", "x" * 20_000_000)],
    ids=["no float", "no text", "long"],
)
def test_a_message_is_short(name, value):
    """Whatever was given: a number that no float can hold, one without a text, a text of 20 MB."""
    with pytest.raises(InvalidArgument, match=rf"^{name}: got .*allowed: {NUMBER}") as caught:
        Settings(**{name: value})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", [["0"], None, 1, b"0"], ids=repr)
def test_a_block_list_is_text(text):
    """Whatever comes through a link of a graph."""
    with pytest.raises(InvalidArgument, match=r"^dense_blocks: got <class .*instance of str"):
        parse_blocks(text)


@pytest.mark.parametrize("m", TILE_QUERIES)
@pytest.mark.parametrize("n", TILE_KEYS)
def test_every_tile_is_allowed(m, n):
    """All combinations are offered, so none may be refused."""
    assert Settings(tile_queries=m, tile_keys=n) == Settings(
        threshold=1.0, tile_queries=m, tile_keys=n, tail=True, order="cells"
    )


@pytest.mark.parametrize("number", [Fraction(1, 4), np.float32(0.25), np.float16(0.25), Fraction(1, 10**400)])
def test_numbers_of_any_kind_become_floats(number):
    """Reports and messages to the page take plain numbers only."""
    settings = Settings(threshold=number, method="top_k", method_parameter=number)
    assert json.loads(json.dumps([settings.threshold, settings.method_parameter])) == [float(number)] * 2
    assert settings.log_bound(64) == Settings(threshold=float(number)).log_bound(64)


def test_settings_are_values():
    """Plans and caches rely on settings that cannot change under them."""
    assert Settings(threshold=0) == Settings(threshold=0.0)
    assert hash(Policy()) == hash(
        Policy(
            warmup_steps=2,
            final_dense_steps=0,
            dense_blocks=frozenset(),
            min_tokens=0,
            reuse_steps=1,
            reuse_memory_mb=1200,
        )
    )
    with pytest.raises(AttributeError):
        Settings().threshold = 2.0


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("", ()),
        ("   ", ()),
        ("0", (0,)),
        ("0, 1, 38-39", (0, 1, 38, 39)),
        ("3-5", (3, 4, 5)),
        ("7-7", (7,)),
        ("2,1,2", (1, 2)),
        (" 4 - 6 ,\t0 ", (0, 4, 5, 6)),
        ("9999", (9999,)),
        ("007", (7,)),
    ],
    ids=repr,
)
def test_block_list(text, blocks):
    """What users write."""
    assert parse_blocks(text) == frozenset(blocks)


@given(st.frozensets(st.integers(0, 60)))
def test_ranges_are_read_as_the_same_blocks(blocks):
    """Remarks name blocks the way the input does; a run of them is one range."""
    assert parse_blocks(ranges(blocks)) == blocks
    assert ranges({9, 2, 3, 4}) == "2-4, 9"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("x", "x"),
        ("0,", ""),
        (",", ""),
        ("1,,2", ""),
        ("5-3", "5-3"),
        ("-1", "-1"),
        ("1-", "1-"),
        ("-", "-"),
        ("1-2-3", "1-2-3"),
        ("1 2", "1 2"),
        ("1.5", "1.5"),
        ("0, one", "one"),
        ("0; 1", "0; 1"),
        ("10000", "10000"),
        ("1\N{EN DASH}2", "1\N{EN DASH}2"),
        ("\N{ARABIC-INDIC DIGIT ONE}", "\N{ARABIC-INDIC DIGIT ONE}"),
        ("0, 1e3", "1e3"),
        ("[0]", "[0]"),
        ("+1", "+1"),
        ("0x1", "0x1"),
        ("all", "all"),
    ],
    ids=lambda x: ascii(x),
)
def test_block_list_rejects_garbage(text, part):
    """A typing slip must not silently make other blocks dense, nor none."""
    with pytest.raises(InvalidArgument) as caught:
        parse_blocks(text)
    assert str(caught.value) == message(
        "dense_blocks", part, RISING, "Separate them with commas, or leave the field empty."
    )


@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, *(lambda x, p=p: pickle.loads(pickle.dumps(x, p)) for p in range(6))],
    ids=["copy", "deepcopy", *(f"pickle {p}" for p in range(6))],
)
def test_copies(again):
    """Of what the user chose, and of errors, whatever was given: a queue between processes keeps them."""
    for chosen in (Settings(threshold=0.5, order="hilbert"), Policy(dense_blocks=frozenset({1, 3}))):
        assert again(chosen) == chosen
    assert again(TokenLayout((2, 3, 4), front=5)).length == 29
    for kind in (InvalidArgument, Unsupported):
        error = kind("tile_keys", (x for x in "no copy"), "1, 2", "Use 1.")
        copied = again(error)
        assert type(copied) is kind and str(copied) == str(error) and copied.args == error.args
