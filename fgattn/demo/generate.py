"""Sampling: flow matching with Euler steps, x_t = (1 - sigma) * video + sigma * noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ..runs.reports import RunReport
from .model import VideoTransformer

SHIFT = 8.0  # moves the schedule towards high noise
GUIDANCE = 3.0


class Sampled(Protocol):
    """What a generation calls: an engine, or what benchmarks put in its place."""

    def begin_run(self, sigmas: Sequence[float], full_noise: bool, device: torch.device) -> None: ...

    def begin_evaluation(self, sigma: float) -> None: ...

    def end_run(self) -> Any:  # an engine's RunReport
        ...


def schedule(steps: int) -> list[float]:
    """Falling noise levels from 1 to 0, one more than steps."""
    even = [1 - i / steps for i in range(steps + 1)]
    return [SHIFT * s / (1 + (SHIFT - 1) * s) for s in even]


@torch.no_grad()
def generate(
    model: VideoTransformer,
    noise: torch.Tensor,
    context: torch.Tensor,
    engine: Sampled,
    steps: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[torch.Tensor, RunReport]:
    """Turn noise into a latent video; the report tells what the engine did.

    Args:
        noise: fp32 [1, 16, T, H, W].
        context: fp32 [1, 8, 4096]; the unconditional branch sees zeros.
        progress: called with the number of steps done, once before the first.
    """
    dtype = model.patch_embedding.weight.dtype
    x, sigmas = noise, schedule(steps)
    both = torch.cat((context, torch.zeros_like(context))).to(dtype)
    engine.begin_run(sigmas, full_noise=True, device=x.device)
    progress(0)
    for step in range(steps):
        sigma, following = sigmas[step : step + 2]
        engine.begin_evaluation(sigma)
        time = torch.full((2,), 1000 * sigma, device=x.device)
        wanted, free = model(x.to(dtype).expand(2, -1, -1, -1, -1), time, both, engine).float().split(1)
        x = x + (following - sigma) * (free + GUIDANCE * (wanted - free))
        progress(step + 1)
    return x, engine.end_run()


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance."""
    return ((value - expected).norm() / expected.norm()).item()


def psnr(frames: torch.Tensor, expected: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of values in 0..1, dB; infinite if they are equal."""
    return -10 * torch.log10((frames - expected).square().mean()).item()
