"""Whole calls on the demo model's own q, k and v at 480p length: planning, tail, attention, error.

Layers and noise levels are spread over the model and the schedule; the error is that of the output
against dense attention in the same type.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from fgattn import Settings, TokenLayout, attend, build_plan
from fgattn.demo.generate import schedule
from fgattn.demo.quantise import load_model
from fgattn.demo.scenes import conditioning
from fgattn.kernels.pooled import tail_triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .measure import milliseconds, relative_error

SIZE = (21, 60, 104)  # T, H, W of the latent: 32 760 tokens
STEPS, BLOCKS = (5, 10, 15), (1, 4, 7)


class Recorder:
    """Stands in for an engine: runs dense and keeps the calls of some blocks."""

    def __init__(self):
        self.calls: list[tuple[torch.Tensor, ...]] = []

    def attention(self, q, k, v, *, layout, dense, block, scale=None):
        if block in BLOCKS:
            self.calls.append((q.clone(), k.clone(), v.clone()))
        return dense()


@torch.no_grad()
def recorded_calls() -> dict[tuple[int, int], tuple[torch.Tensor, ...]]:
    """(step, block) -> q, k, v [1, 3, 32760, 128] of a noised reference scene, bf16."""
    model = load_model().to("cuda", torch.bfloat16)
    noise = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(1)).cuda()
    context = conditioning(1).cuda().to(torch.bfloat16)
    sigmas, x, calls = schedule(20), noise, {}
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        recorder = Recorder()
        time = torch.full((1,), 1000 * sigma, device="cuda")
        velocity = model(x.to(torch.bfloat16), time, context, recorder).float()
        if step in STEPS:
            calls |= {(step, b): call for b, call in zip(BLOCKS, recorder.calls, strict=True)}
        x = x + (following - sigma) * velocity
    return calls


def rows(quick: bool = False):
    """One row per (settings, step, block)."""
    layout = TokenLayout((SIZE[0], SIZE[1] // 2, SIZE[2] // 2))
    result = []
    for (step, block), (q, k, v) in recorded_calls().items():
        q, k, v = (x.repeat(1, 4, 1, 1) for x in (q, k, v))  # 12 heads, as in a model of 1.3 B parameters

        def dense(q=q, k=k, v=v):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q, k, v)

        for m, n, threshold in ((128, 16, 1.0), (128, 16, 2.0)) if quick else (
                (128, 16, 0.7), (128, 16, 1.0), (128, 16, 1.5), (128, 16, 2.0), (128, 1, 1.0), (64, 16, 1.0)):
            settings = Settings(threshold, m, n)
            plan = build_plan(q, k, settings, layout)
            error = relative_error(attend(q, k, v, plan), dense())
            if not error < 1:
                raise SystemExit(f"step {step}, block {block}, {settings}: relative error {error:.2e}")
            planning, tail, call, cudnn = milliseconds(
                lambda q=q, k=k, s=settings: build_plan(q, k, s, layout),
                lambda q=q, k=k, v=v, p=plan: tail_triton(q, k, v, p),
                lambda q=q, k=k, v=v, p=plan: attend(q, k, v, p), dense, repeats=5)
            result.append({
                "M": m, "N": n, "threshold": threshold, "step": step, "block": block, "L": layout.length,
                "heads": q.shape[1], "density": float(plan.density),
                "executed_density": float(plan.executed_density), "relative_error": error,
                "plan_ms": planning["ms"], "tail_ms": tail["ms"], "attend_with_tail_ms": call["ms"],
                "cudnn_dense_ms": cudnn["ms"],
                "speedup": cudnn["ms"] / (planning["ms"] + call["ms"])})
    return result
