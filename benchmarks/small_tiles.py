"""Query tiles of 16 and 32 rows on real masks: rate of the requested scores against dense cuDNN.

q, k and v are the demo model's at 480p length; the threshold is searched for the requested density.
ratio = 4 L^2 D H * requested density / time, over dense cuDNN's rate. Tiles that run together compute the
union of their lists: executed / requested says what that costs. Tail off; lists are made in the timed call.
Each row is checked against float64 on sampled tiles.
"""

from __future__ import annotations

import torch
from fgattn import Settings, TokenLayout, attend, build_plan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .kernel import TOLERANCE
from .measure import milliseconds, relative_error
from .pipeline import SIZE, recorded_calls

DENSITY, ALLOWED = 0.15, 0.005
FIGURES = ("density", "executed_to_requested", "ratio_to_cudnn")


def plan_of_density(q, k, m: int, layout: TokenLayout):
    """(threshold, plan) with 16-key slices whose requested density is DENSITY."""
    low, high = 0.01, 100.0
    for _ in range(30):
        threshold = (low * high) ** 0.5
        plan = build_plan(q, k, Settings(threshold, m, 16, tail=False), layout)
        off = float(plan.density) - DENSITY
        if abs(off) < ALLOWED / 5:
            return threshold, plan
        low, high = (threshold, high) if off > 0 else (low, threshold)
    raise SystemExit(f"M={m}: no threshold gives a density of {DENSITY}")


def sampled_error(q, k, v, out, plan) -> float:
    """Relative error of a few executed tiles against float64."""
    errors = []
    heads, tiles = plan.bits.shape[1:3]
    for head, tile in ((0, 0), (heads - 1, tiles - 1), (heads // 2, tiles // 2)):
        tokens = plan.query_tokens[0, head, tile * plan.tile_rows : (tile + 1) * plan.tile_rows]
        keys = plan.geometry.key_tokens[plan.kept_keys(0, slice(head, head + 1))[0, tile]]
        scores = q[0, head, tokens].double() @ k[0, head, keys].double().T * q.shape[3] ** -0.5
        errors.append(relative_error(out[0, head, tokens], scores.softmax(1) @ v[0, head, keys].double()))
    return max(errors)


def rows(quick: bool = False):
    """One row per (M, step, block), and the geometric means."""
    layout = TokenLayout((SIZE[0], SIZE[1] // 2, SIZE[2] // 2))
    result = []
    for number, ((step, block), call) in enumerate(recorded_calls().items()):
        if quick and number % 4:
            continue
        q, k, v = (x.repeat(1, 4, 1, 1) for x in call)  # 12 heads, as in a model of 1.3 B parameters

        def dense(q=q, k=k, v=v):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q, k, v)

        for m in (32, 16):
            threshold, plan = plan_of_density(q, k, m, layout)
            error = sampled_error(q, k, v, attend(q, k, v, plan), plan)
            if not error < TOLERANCE:
                raise SystemExit(f"M={m}, step {step}, block {block}: relative error {error:.2e}, no rate")
            ours, planning, cudnn = milliseconds(
                lambda q=q, k=k, v=v, p=plan: attend(q, k, v, p),
                lambda q=q, k=k, m=m, t=threshold: build_plan(q, k, Settings(t, m, 16), layout),
                dense, repeats=10)
            density = float(plan.density)
            result.append({
                "M": m, "N": 16, "step": step, "block": block, "L": layout.length, "heads": q.shape[1],
                "threshold": threshold, "density": density,
                "executed_to_requested": float(plan.executed_density) / density, **ours,
                "plan_ms": planning["ms"], "cudnn_dense_ms": cudnn["ms"],
                "ratio_to_cudnn": density * cudnn["ms"] / ours["ms"], "relative_error": error})
    for m in (32, 16):
        of_m = [row for row in result if row["M"] == m]
        means = {x: torch.tensor([r[x] for r in of_m]).log().mean().exp().item() for x in FIGURES}
        result.append({**dict.fromkeys(of_m[0], ""), "M": m, "N": 16, "step": "mean", **means})
    return result
