"""Whole generations of the demo model at 480p length: how near frames are to dense ones, at what cost.

20 steps with guidance; the first steps are dense for all, so that all start from the same video. Afterwards
every self-attention is ours, `sol_attn`'s or dense, between CUDA events: planning and tail are in, the
reordering of tokens for `sol_attn` is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fgattn import Settings, TokenLayout
from fgattn.demo.generate import generate, psnr
from fgattn.demo.model import CHANNELS, HEAD_DIM
from fgattn.demo.quantise import load_model
from fgattn.demo.scenes import conditioning, to_rgb
from fgattn.layout import geometry
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .measure import planned_attention, relative_error
from .peers import SOL_BLOCK, in_order, sol_density
from .targets import MEASURED

SIZE = (21, 60, 104)  # T, H, W of the latent
LAYOUT = TokenLayout((SIZE[0], SIZE[1] // 2, SIZE[2] // 2))  # 32 760 tokens
STEPS, DENSE_STEPS, SEEDS = 20, 4, (1, 2)
SETTINGS = [(128, 16, threshold) for threshold in (0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)]
SETTINGS += [(128, 1, 1.0), (128, 1, 2.0), (64, 16, 1.0), (64, 16, 2.0)]
SOL_TAUS = (0.7, 1.0, 1.3, 1.7)
HEADS = 3
WRONG = 15.0  # dB; under this something is broken

Timed = Callable[[Callable], Any]  # runs a call between two events
Way = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]  # q, k, v, timed -> output and density


def dense(q, k, v, timed: Timed):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return timed(lambda: scaled_dot_product_attention(q, k, v)), None


def ours(q, k, v, timed: Timed, *, settings: Settings):
    def call():
        out, plan = planned_attention(q, k, v, settings, LAYOUT)
        return out, plan.requested

    out, requested = timed(call)
    return out, requested.sum() / (requested.numel() * q.shape[2] * k.shape[2])


def sol(q, k, v, timed: Timed, *, tau: float, tokens: torch.Tensor | None):
    from comfy_kitchen import sol_attn

    q_, k_, v_ = (in_order(x, tokens).transpose(1, 2) for x in (q, k, v))  # [B, L, H, D]
    out = timed(lambda: sol_attn(q_, k_, v_, tau=tau)).transpose(1, 2)
    if tokens is not None:
        out = torch.empty_like(out).index_copy_(2, tokens, out)
    return out, sol_density(q_, k_, tau)


class Timer:
    """Stands in for an engine: dense at first, then one way for every call, timed."""

    def __init__(self, way: Way):
        self.way, self.evaluations = way, 0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.densities: list[torch.Tensor] = []

    def begin_run(self, sigmas, full_noise, device):
        pass

    def begin_evaluation(self, sigma):
        self.evaluations += 1

    def attention(self, q, k, v, *, layout, dense, block):
        if self.evaluations <= DENSE_STEPS:
            return dense()
        out, density = self.way(q, k, v, self.timed)
        if density is not None:
            self.densities.append(density)
        return out

    def timed(self, call):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        end.record()
        self.events.append((start, end))
        return result

    def end_run(self):
        torch.cuda.synchronize()

    def columns(self) -> dict[str, object]:
        times = [start.elapsed_time(end) for start, end in self.events]
        density = torch.stack(self.densities).mean().item() if self.densities else 1.0
        return {"density": density, "calls": len(times), "ms": sum(times) / len(times)}


def rows(quick: bool) -> Iterator[dict[str, object]]:
    """One row per way and seed; frames are compared with those of the dense generation of the seed."""
    model = load_model().to("cuda", torch.bfloat16)
    for seed in SEEDS[:1] if quick else SEEDS:
        noise = torch.randn(1, CHANNELS, *SIZE, generator=torch.Generator().manual_seed(seed)).cuda()
        context = conditioning(seed).cuda()
        expected = None
        for columns, way in ways():
            columns = {"case": "generation", "L": LAYOUT.length, "steps": STEPS, "seed": seed, **columns}
            try:
                warm_up(way)
            except ImportError as error:
                yield {**columns, "status": f"not installed: {error}"}
                continue
            timer = Timer(way)
            latent = generate(model, noise, context, timer, STEPS)[0][0].float()
            expected = latent if expected is None else expected
            yield {**columns, **timer.columns(), **judged(latent, expected)}


def ways() -> Iterator[tuple[dict[str, object], Way]]:
    """Dense first."""
    yield {"impl": "cudnn"}, dense
    for m, n, threshold in SETTINGS:
        settings = Settings(threshold=threshold, tile_queries=m, tile_keys=n)
        yield (
            {"impl": "fgattn", "M": m, "N": n, "order": settings.order, "threshold": threshold},
            functools.partial(ours, settings=settings),
        )
    cells = geometry(LAYOUT, "cells", LAYOUT.length, torch.device("cuda")).key_tokens
    for order, tokens in (("raster", None), ("cells", cells)):
        for tau in SOL_TAUS:
            yield (
                {"impl": "sol_attn", "M": SOL_BLOCK, "N": SOL_BLOCK, "order": order, "threshold": tau},
                functools.partial(sol, tau=tau, tokens=tokens),
            )


def warm_up(way: Way) -> None:
    """Compile what is to be timed."""
    q, k, v = torch.randn(3, 2, HEADS, LAYOUT.length, HEAD_DIM, device="cuda").to(torch.bfloat16).unbind()
    way(q, k, v, lambda call: call())


def judged(latent: torch.Tensor, expected: torch.Tensor) -> dict[str, object]:
    """Distances from the dense generation; the row is withheld where they are absurd."""
    if latent is expected:
        return {"status": MEASURED}
    decibels = psnr(to_rgb(latent), to_rgb(expected))
    columns = {"psnr_db": decibels, "latent_error": relative_error(latent, expected), "status": MEASURED}
    if not decibels > WRONG:
        columns["status"] = f"withheld: PSNR {decibels:.3g} dB, not above {WRONG:g}"
    return columns
