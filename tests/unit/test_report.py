"""Report text: what users read, in each state that a run can end in."""

import dataclasses

import numpy as np
import pytest
import torch
from fgattn.outcomes import Outcome, Reason
from fgattn.runs.reports import BlockReport, RunReport, StepReport
from fgattn.show.text import describe, headline, percent, text
from makers import CHOSEN, by_reason

FULL = RunReport(
    settings=CHOSEN,
    tokens=32760,
    implementation="triton",
    device="NVIDIA H200",
    total=12345.0,
    steps=(StepReport(0, 900.0, 600.0, 0.0, 0, 80), StepReport(1, 500.0, 180.0, 20.0, 78, 2)),
    blocks=(BlockReport(-1, 0.5, 0.75), BlockReport(3, 0.251, 0.3)),
    calls=by_reason(warm_up=80, sparse=78, dense_block=2),
    dense_call=7.5,
    sparse_call=2.5,
    density=0.2512,
    executed_density=0.3,
    peak_memory=3 << 29,
    failure=None,
    remarks=("fp32 tensors are computed in bf16",),
)
DENSE = dataclasses.replace(
    FULL,
    calls={
        **by_reason(cross_attention=90, warm_up=5),
        Reason(Outcome.MIN_TOKENS, "fewer than 4096 tokens"): 80,
    },
    sparse_call=None,
    density=None,
    executed_density=None,
    blocks=(),
    remarks=(),
)
NOTHING = dataclasses.replace(DENSE, steps=(), calls={}, dense_call=None, total=0.0, peak_memory=None)


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (FULL, "sparse: 25 % of scores, attention 3.00x faster"),
        (dataclasses.replace(FULL, sparse_call=15.0), "sparse: 25 % of scores, attention 2.00x slower"),
        (dataclasses.replace(FULL, dense_call=None), "sparse: 25 % of scores, no dense step to compare with"),
        (DENSE, "dense: fewer than 4096 tokens"),
        (dataclasses.replace(DENSE, calls=by_reason(cross_attention=3)), "attention never reached FG-Attn"),
        (NOTHING, "attention never reached FG-Attn"),
        (
            dataclasses.replace(FULL, failure="RuntimeError: no kernel image"),
            "dense after an error: RuntimeError: no kernel image",
        ),
    ],
    ids=["sparse", "slower", "no dense step", "dense", "cross-attention only", "nothing", "error"],
)
def test_headline(report, line):
    """One line under the node: what ran, or the most frequent reason why not."""
    assert headline(report) == line
    assert text(report).splitlines()[0] == line


def test_whole_report():
    """Every number, in lines that need no columns: nodes show proportional type."""
    assert text(FULL).splitlines() == [
        "sparse: 25 % of scores, attention 3.00x faster",
        "",
        "settings: threshold 1, tiles 128x16, cells order, tail on, warm-up 2 of 8 steps",
        "implementation: triton on NVIDIA H200, 32760 tokens",
        "run: 12.35 s, 2 steps, planning 20.0 ms",
        "attention call: dense 7.50 ms, sparse 2.50 ms",
        "density: 25 % requested, 30 % executed",
        "peak VRAM: 1.50 GiB",
        "remark: fp32 tensors are computed in bf16",
        "",
        "80 calls: warm-up step",
        "78 calls: sparse",
        "2 calls: listed in dense_blocks",
        "",
        "step 1: 900.0 ms, attention 600.0, planning 0.0; 0 sparse, 80 dense",
        "step 2: 500.0 ms, attention 180.0, planning 20.0; 78 sparse, 2 dense",
        "",
        "block ?: density 50 %, executed 75 %",
        "block 3: density 25 %, executed 30 %",
    ]


@pytest.mark.parametrize(
    ("plans", "lines"),
    [
        ({}, []),
        ({"made": 78}, []),
        ({"made": 26, "reused": 52}, ["plans: 26 made, 52 reused, which saved about 10.4 ms of planning"]),
        (
            {"made": 26, "reused": 48, "not kept": 4},
            [
                "plans: 30 made, 48 reused, which saved about 10.4 ms of planning",
                "plans not kept: 4, memory (reuse_memory_mb) is full",
            ],
        ),
        ({"not kept": 78}, ["plans not kept: 78, memory (reuse_memory_mb) is full"]),
    ],
    ids=["dense", "fresh", "reused", "some do not fit", "none fits"],
)
def test_plans_are_told_of_where_they_are_kept(plans, lines):
    """What reuse gains, and the input to raise when it does not fit."""
    found = text(dataclasses.replace(FULL, plans=plans, planning_saved=10.4)).splitlines()
    assert [line for line in found if line.startswith("plans")] == lines


@pytest.mark.parametrize(
    ("report", "has", "lacks"),
    [
        (DENSE, ["attention call: no sparse call; dense 7.50 ms"], ["density", "block ", "None"]),
        (
            NOTHING,
            ["attention call: no sparse call", "run: 0.00 s, 0 steps, planning 0.0 ms"],
            ["peak VRAM", "step ", "block ", "None", ";"],
        ),
        (
            dataclasses.replace(FULL, dense_call=None),
            ["attention call: sparse 2.50 ms; no dense step in this run to compare with"],
            ["None", "faster"],
        ),
        (dataclasses.replace(FULL, failure="RuntimeError: bad"), ["error: RuntimeError: bad"], ["None"]),
        (dataclasses.replace(FULL, peak_memory=None), ["attention call:"], ["peak VRAM", "None"]),
    ],
    ids=["dense", "nothing", "no dense step", "error", "no VRAM"],
)
def test_fields_without_a_value_are_left_out(report, has, lacks):
    """Never "None" on a node."""
    lines = text(report)
    assert all(line in lines.splitlines() or line in lines for line in has)
    assert not any(part in lines for part in lacks)


def test_estimated_errors_are_told_where_there_are_any():
    """In the headline, for the run, and beside the steps and blocks that have one; two digits."""
    report = dataclasses.replace(
        FULL,
        estimated_error=0.0612,
        steps=(FULL.steps[0], dataclasses.replace(FULL.steps[1], estimated_error=0.123)),
        blocks=(FULL.blocks[0], dataclasses.replace(FULL.blocks[1], estimated_error=0.00431)),
    )
    lines = text(report).splitlines()
    assert lines[0] == "sparse: 25 % of scores, attention 3.00x faster, est. error 6.1 %"
    assert "estimated error of attention: 6.1 % against dense, from random query rows of some calls" in lines
    assert "step 2: 500.0 ms, attention 180.0, planning 20.0; 78 sparse, 2 dense; est. error 12 %" in lines
    assert "block 3: density 25 %, executed 30 %, est. error 0.43 %" in lines
    assert sum("est. error" in line for line in lines) == 3 and "estimated" not in text(FULL)


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.0, "0 %"),
        (1e-9, "<0.01 %"),
        (9e-5, "<0.01 %"),
        (1e-4, "0.01 %"),
        (0.0099, "0.99 %"),
        (0.0999, "10 %"),
        (0.125, "13 %"),
        (1.0, "100 %"),
        (2.345, "230 %"),
        (torch.tensor(0.061), "6.1 %"),
        (np.float32(0.061), "6.1 %"),
    ],
)
def test_percent(share, words):
    """Plain numbers, and those of tensors and arrays."""
    assert percent(share) == words


def test_moved_sliders_are_listed():
    """Enough to repeat the run; nothing where they stood still."""
    moved = dataclasses.replace(FULL, sliders=((0, 1.0, 2), (4, 1.4, 3)))
    assert (
        "sliders from step 1: threshold 1, warm-up 2\nsliders from step 5: threshold 1.4, warm-up 3"
    ) in text(moved)
    assert "sliders" not in text(dataclasses.replace(FULL, sliders=moved.sliders[:1]))


USUAL = "threshold 1, tiles 128x16, cells order, tail on, warm-up 2 of 8 steps"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, USUAL),
        (
            {
                "method": "top_k",
                "strength": 0.3,
                "tile_queries": 64,
                "tile_keys": 1,
                "order": "raster",
                "tail": False,
            },
            "top_k 0.3, tiles 64x1, raster order, tail off, warm-up 2 of 8 steps",
        ),
        (
            {"reuse_steps": 3, "moved": True, "moved_threshold": 0.7},
            f"{USUAL}, plans serve 3 steps, moved to threshold 0.7",
        ),
        (
            {"moved": True, "moved_threshold": 0.0, "moved_warmup_steps": 0},
            f"{USUAL}, moved to threshold 0 and warm-up 0",
        ),
        ({"moved": True}, f"{USUAL}, moved to and fro"),
    ],
    ids=["usual", "other method", "reuse", "both moved", "and back"],
)
def test_settings_in_words(changes, words):
    assert describe(dataclasses.replace(CHOSEN, **changes)) == words
