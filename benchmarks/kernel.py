"""The attention kernel alone: rates against dense cuDNN, and what uneven or indirect input costs.

ratio = speed-up * density, so that 1.0 of the dense rate means that nothing is lost to the fine grain. Lists
are made in the timed call. Each row is checked against float64 on sampled query tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from fgattn import TokenLayout, attend, plan_from_mask
from fgattn.backends import registry
from fgattn.backends.base import Planned, Tail
from fgattn.call import Call

from . import peers
from .measure import best_backend, sampled_error, tail_of
from .runner import Case, Run
from .shapes import LARGE_720P, QKV, SMALL_480P, Shape, random_qkv

DENSITY = 0.3
TILE_KEYS = (1, 2, 4, 8, 16, 32, 64, 128)
SPREAD = 20  # longest over shortest list of the skewed case


def cases(quick: bool) -> Iterator[Case]:
    """Every line of the table of targets; peers and the portable kernel's rows unless quick."""
    best = best_backend().name
    ours = list(dict.fromkeys((best, "triton")))
    ours, repeats = (ours[:1], 10) if quick else (ours, 20)
    shape = SMALL_480P

    def case(name, make, *args, dim=128, shape=shape, repeats=repeats, **columns) -> Case:
        flop = 4 * shape.length**2 * dim * shape.heads
        return Case(
            {"case": name, "D": dim, "L": shape.length, "heads": shape.heads, **columns},
            functools.partial(make, shape, dim, *args),
            repeats,
            figures=lambda row: {"tflops": flop * row["density"] / row["ms"] / 1e9},
        )

    for m in (128, 64):
        for n in (1, 8, 16, 32, 64, 128) if quick else TILE_KEYS:
            yield case("random lists", random_lists, m, n, DENSITY, ours, M=m, N=n)
    for n in (16,) if quick else (1, 4, 16, 64, 128):
        impls = ours if n in (1, 16, 64) else ours[:1]
        yield case("random lists", random_lists, 128, n, DENSITY, impls, dim=64, M=128, N=n)
    for density in (0.1, 0.05):
        yield case("random lists", random_lists, 128, 16, density, ours, M=128, N=16)
    yield case(
        "random lists", random_lists, 128, 16, DENSITY, ours[:1], shape=LARGE_720P, repeats=5, M=128, N=16
    )
    yield case("all keys", all_keys, ours, () if quick else (peers.flash, peers.fa4))
    yield case("skewed lists", skewed_lists, ours[0])
    yield case("given tail", given_tail, ours[0])
    yield case("addressing", addressing, ours[0])
    if not quick:
        for m, n in ((128, 128), (64, 64), (128, 16), (128, 1)):
            yield case("block-sparse peers", block_sparse, m, n, ours[0], M=m, N=n)
        for tau, density in ((0.524, 0.3), (1.282, 0.1), (1.881, 0.03)):  # quantiles of a Gaussian
            yield case("sol_attn", sol, tau, density, ours[0], M=64, N=64)


def random_lists(shape: Shape, dim: int, m: int, n: int, density: float, impls: list[str]) -> list[Run]:
    qkv = random_qkv(shape, dim)
    mask = random_mask(shape, m, n, density)
    return [peers.cudnn(qkv), *(ours(qkv, mask, m, n, impl) for impl in impls)]


def all_keys(shape: Shape, dim: int, impls: list[str], others) -> list[Run]:
    qkv = random_qkv(shape, dim)
    mask = torch.ones(
        shape.heads, -(-shape.length // 128), -(-shape.length // 16), dtype=torch.bool, device="cuda"
    )
    return [
        peers.cudnn(qkv),
        *(ours(qkv, mask, 128, 16, impl) for impl in impls),
        *(other(qkv) for other in others),
    ]


def skewed_lists(shape: Shape, dim: int, impl: str) -> list[Run]:
    """Lists of equal length against lists of the same total, spread over heads and tiles."""
    qkv = random_qkv(shape, dim)
    even = random_mask(shape, 128, 16, DENSITY)
    heads, tiles, slices = even.shape
    # Longer in some heads and in some tiles; by rank, so that lengths fill the whole spread.
    rank = (torch.rand(heads, 1, device="cuda") + torch.rand(heads, tiles, device="cuda")).flatten()
    rank = rank.argsort().argsort().double() / (rank.numel() - 1)
    counts = SPREAD**rank
    counts = (counts * (even.sum() / counts.sum())).round().long().view(heads, tiles)
    order = torch.rand(heads, tiles, slices, device="cuda").argsort(-1).argsort(-1)
    skewed = order < counts[..., None]
    return [
        ours(qkv, even, 128, 16, impl, name=f"{impl}, even"),
        ours(qkv, skewed, 128, 16, impl, name=f"{impl}, {SPREAD}:1"),
    ]


def given_tail(shape: Shape, dim: int, impl: str) -> list[Run]:
    """The launch without and with a tail that is there already."""
    qkv = random_qkv(shape, dim)
    mask = random_mask(shape, 128, 16, DENSITY)
    plan = plan_from_mask(mask, 128, 16, query_length=shape.length, key_length=shape.length)
    tail, backend = tail_of(*qkv, plan), registry.by_name(impl)

    def call(tail):
        out = torch.empty_like(qkv.q)
        backend.attend(Call.under(plan, *qkv), Planned(plan), tail, out)
        return out

    return [
        ours(qkv, mask, 128, 16, impl, name=f"{impl}, no tail", call=lambda: call(None)),
        ours(qkv, mask, 128, 16, impl, name=f"{impl}, tail", call=lambda: call(tail), tail=tail),
    ]


def addressing(shape: Shape, dim: int, impl: str) -> list[Run]:
    """Contiguous [B, H, L, D] in raster order against [B, L, H, D] and the order of cells."""
    qkv = random_qkv(shape, dim)
    mask = random_mask(shape, 128, 16, DENSITY)
    strided = QKV(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv))
    return [
        ours(given, mask, 128, 16, impl, name=f"{impl}, {name}", layout=shape.layout, order=order)
        for name, given, order in (
            ("contiguous raster", qkv, "raster"),
            ("BLHD", strided, "raster"),
            ("cells", qkv, "cells"),
            ("BLHD cells", strided, "cells"),
        )
    ]


def block_sparse(shape: Shape, dim: int, m: int, n: int, impl: str) -> list[Run]:
    """One mask, every kernel that can run it."""
    qkv = random_qkv(shape, dim)
    mask = random_mask(shape, m, n, DENSITY)
    runs = [peers.cudnn(qkv), ours(qkv, mask, m, n, impl), peers.flashinfer(qkv, mask, m, n)]
    if n >= 64:
        runs.append(peers.flex(qkv, mask, n))
    if n >= 16:
        runs.append(peers.fa4_sparse(qkv, mask, m, n))
    return runs


def sol(shape: Shape, dim: int, tau: float, density: float, impl: str) -> list[Run]:
    """`sol_attn` at the threshold that gives a density on random tensors, ours at the same block size."""
    qkv = random_qkv(shape, dim)
    return [
        peers.cudnn(qkv),
        ours(qkv, random_mask(shape, 64, 64, density), 64, 64, impl),
        peers.sol(qkv, tau),
    ]


def ours(
    qkv: QKV,
    mask: torch.Tensor,
    m: int,
    n: int,
    impl: str,
    *,
    name: str = "",
    call: Callable[[], torch.Tensor] | None = None,
    tail: Tail | None = None,
    layout: TokenLayout | None = None,
    order: str = "raster",
) -> Run:
    """One of our kernels on a mask [H, tiles, slices], checked against that mask."""
    length = qkv.k.shape[2]
    plan = plan_from_mask(mask, m, n, query_length=length, key_length=length, layout=layout, order=order)

    def kept(head: int, tile: int) -> torch.Tensor:
        return mask[head, tile].repeat_interleave(n)[:length]

    return Run(
        name or impl,
        call or functools.partial(attend, *qkv, plan, impl=impl),
        lambda out: sampled_error(qkv, out, m, kept=kept, geometry=plan.geometry, tail=tail),
        peers.TOLERANCE,
        {"M": m, "N": n, "density": float(plan.density)},
    )


def random_mask(shape: Shape, m: int, n: int, density: float) -> torch.Tensor:
    """Exactly the same number of random slices in every tile, [H, tiles, slices]."""
    generator = torch.Generator("cuda").manual_seed(1)
    scores = torch.rand(
        shape.heads, -(-shape.length // m), -(-shape.length // n), generator=generator, device="cuda"
    )
    return scores <= scores.kthvalue(max(1, round(density * scores.shape[2])), dim=2, keepdim=True).values
