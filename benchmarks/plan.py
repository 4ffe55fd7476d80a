"""What planning and the tail cost, stage by stage, beside dense cuDNN attention on the same tensors.

Stages are timed apart, with their launches hidden. `plan` is build_plan, which summarises q and k first;
`tail` is given summaries, `means and tail` makes them, as for a plan that is reused. Bits are checked
against the torch implementation's on a few heads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from fgattn import Settings, build_plan, sparse_attention
from fgattn.backends.base import Backend, Planned
from fgattn.backends.hopper.boxes import boxes_for
from fgattn.backends.pytorch import scoring
from fgattn.backends.shared.launch import key_rows, query_rows
from fgattn.backends.shared.lists import Lists
from fgattn.backends.shared.summarise import summarise
from fgattn.call import Call
from fgattn.layout import geometry

from . import peers
from .measure import best_backend, planned_error, relative_error, tail_of
from .runner import Case, Run
from .shapes import LARGE_720P, SMALL_480P, Shape, for_density, random_qkv

DENSITY = 0.3
CHECKED_HEADS = 2
BITS_TOLERANCE = 1e-4  # share of bytes that differ: decisions within rounding
EXACT = 1e-9  # any tile that differs is too much
ROUNDING = 1e-2  # relative L2 of sums that are rounded to bf16
LAYERS, BRANCHES = 40, 2  # of Wan 14B with both conditioning branches


def cases(quick: bool) -> Iterator[Case]:
    for shape in (SMALL_480P, LARGE_720P):
        columns = {"shape": shape.name, "L": shape.length, "heads": shape.heads, "D": 128}
        yield Case(
            {"case": "stages", **columns},
            functools.partial(stages, shape),
            5 if quick else 10,
            figures=lambda row: {"share": row["ms"] / row["yardstick_ms"]},
        )
    for n in (16, 1):
        yield Case({"case": "memory", **columns}, functools.partial(memory, LARGE_720P, n), 3, warmup=1)


def stages(shape: Shape) -> list[Run]:
    qkv = random_qkv(shape)
    q, k, v = qkv
    layout = shape.layout
    geo = geometry(layout, Settings().order, shape.length, q.device)
    rows = query_rows(geo), key_rows(geo)
    error = functools.partial(summary_error, q, k, v, geo)
    runs = [peers.cudnn(qkv)] + [
        Run(name, functools.partial(summarise, q, k, x, *rows, second=True), error, ROUNDING)
        for name, x in (("summarise q, k", None), ("summarise q, k, v", v))
    ]
    summaries = summarise(q, k, v, *rows)
    backend = best_backend()
    tail = backend.tail
    assert tail
    for n in (16, 1):
        settings = for_density(q, k, Settings(tile_keys=n), layout, DENSITY)
        plan = build_plan(q, k, settings, layout)
        columns = {"M": 128, "N": n, "threshold": settings.threshold, "density": float(plan.density)}
        runs += [
            Run(
                "plan",
                functools.partial(build_plan, q, k, settings, layout),
                functools.partial(bits_error, q, k, settings, layout),
                BITS_TOLERANCE,
                columns,
            ),
            Run(
                "lists",
                functools.partial(make_lists, backend, Call.under(plan, q, k, v), plan),
                functools.partial(lists_error, plan),
                EXACT,
                columns,
            ),
            *(
                Run(
                    name,
                    functools.partial(tail, Call.under(plan, q, k, v), Planned(plan, given)),
                    functools.partial(tail_error, q, k, v, settings, layout),
                    ROUNDING,
                    columns,
                )
                for name, given in (("tail", summaries), ("means and tail", None))
            ),
        ]
    return runs


def memory(shape: Shape, n: int) -> list[Run]:
    """One planned call: what it takes beside q, k, v and the output, and what kept plans like its would."""
    qkv = random_qkv(shape)
    q, k, v = qkv
    settings = for_density(q, k, Settings(tile_keys=n), shape.layout, DENSITY)
    out = None
    for _ in range(2):  # the first call compiles and fills caches that stay
        del out
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = sparse_attention(q, k, v, settings, shape.layout)
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - out.nbytes
    plan = build_plan(q, k, settings, shape.layout)
    kept_plans = (plan.bits.nbytes + plan.requested.nbytes + plan.executed.nbytes) * LAYERS * BRANCHES
    del out

    call = functools.partial(sparse_attention, q, k, v, settings, shape.layout)
    return [
        Run(
            "plan and attend",
            call,
            functools.partial(planned_error, qkv, plan),
            peers.TOLERANCE,
            {
                "M": 128,
                "N": n,
                "threshold": settings.threshold,
                "density": float(plan.density),
                "extra_mb": extra / 1e6,
                "kept_plans_gb": kept_plans / 1e9,
            },
        )
    ]


def make_lists(backend: Backend, call: Call, plan):
    """Numbers of keys of the last heads' tiles, and the first of these heads.

    As an attention call makes them: with the lists, of the last launch's heads; where the attention kernel
    lists single keys itself, alone.
    """
    batch, heads = plan.bits.shape[:2]
    boxes = boxes_for(call)
    if boxes is None and backend.name == "hopper":
        from fgattn.backends.hopper.lister import Counts

        return Counts(plan, batch, heads).listed, 0
    lists = Lists(plan, batch, heads, boxes)
    *_, (_, first, number) = lists.launches()
    return lists.listed[:number], first


def lists_error(plan, made) -> float:
    """Share of the tiles of the last head whose list has another length than the bits say."""
    listed, first = made
    head = first + len(listed) - 1
    kept = plan.kept_keys(0, slice(head, head + 1))[0].sum(-1)
    return (listed[-1] != kept).double().mean().item()


def bits_error(q, k, settings, layout, plan) -> float:
    """Share of bytes that differ from the torch implementation's."""
    heads = slice(0, CHECKED_HEADS)
    expected = build_plan(q[:, heads], k[:, heads], settings, layout, impl="torch")
    return (plan.bits[:, heads] != expected.bits).double().mean().item()


def tail_error(q, k, v, settings, layout, tail) -> float:
    """Of the pooled outputs, relative to the torch implementation's for the same plan."""
    heads = slice(0, CHECKED_HEADS)
    q, k, v = (x[:, heads] for x in (q, k, v))
    expected = tail_of(q, k, v, build_plan(q, k, settings, layout), "torch")
    return max(relative_error(got[:, heads], known) for got, known in zip(tail, expected, strict=True))


def summary_error(q, k, v, geo, made) -> float:
    """Of the first head's means, squares and variances."""
    centroid = scoring.summarise(q[0, :1, geo.query_tokens])[0]
    mean, variance, _ = scoring.summarise(k[0, :1, geo.key_tokens], variance=True)
    value = scoring.summarise(v[0, :1, geo.key_tokens])[0]
    known = centroid, centroid.square(), mean, variance, value
    return max(relative_error(got[0], x[0]) for got, x in zip(made, known, strict=True) if got is not None)
