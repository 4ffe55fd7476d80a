"""How the error grows with the number of steps that a plan serves, on generations of the demo model.

480p length on a GPU, a small video elsewhere. Calls are compared with dense attention on their own q, k, v.
"plan age": every call of a dense generation, computed with the plans of the steps before; the same calls for
every age. "reuse": whole generations with plans kept; latent and frames against a dense generation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from fgattn import Settings, SparsePlan, attend, build_plan
from fgattn.demo.generate import generate, psnr
from fgattn.demo.model import CHANNELS
from fgattn.demo.quantise import load_model
from fgattn.demo.scenes import conditioning, to_rgb
from fgattn.outcomes import Outcome
from fgattn.runs.engine import Engine
from fgattn.settings import Policy

from .measure import relative_error

CUDA_SIZE, CPU_SIZE = (21, 60, 104), (9, 24, 32)  # T, H, W of the latent: 32 760 and 1 728 tokens
STEPS = 20
REUSE_STEPS, SEEDS = (1, 2, 3, 4, 6), (2, 3)
WARMUP = Policy().warmup_steps
AGES = (0, 1, 2, 3, 5)


class Watched(Engine):
    """An engine that compares its sparse calls with dense ones."""

    def __init__(self, settings: Settings, policy: Policy):
        super().__init__(settings, policy)
        self.errors: list[torch.Tensor] = []

    def attention(self, q, k, v, *, dense, **call):
        ran = []

        def fallback():
            ran.append(dense())
            return ran[0]

        out = super().attention(q, k, v, dense=fallback, **call)
        if not ran:
            self.errors.append(error(out, dense()))
        return out


class Aged(Engine):
    """A dense engine that tries plans of the steps before on every call."""

    def __init__(self, settings: Settings):
        super().__init__(settings, Policy())
        self.plans: dict[int | None, list[SparsePlan]] = defaultdict(list)  # by block, of each step
        self.errors: dict[int, list[torch.Tensor]] = defaultdict(list)  # by age
        self.densities: dict[int, list[torch.Tensor]] = defaultdict(list)

    def attention(self, q, k, v, *, layout, dense, block=None, **place):
        out, made = dense(), self.plans[block]
        made.append(build_plan(q, k, self.settings, layout))
        if len(made) > WARMUP + max(AGES):
            for age in AGES:
                plan = made[-1 - age]
                self.errors[age].append(error(attend(q, k, v, plan), out))
                self.densities[age].append(plan.executed_density)
        return out


def rows(quick: bool) -> Iterator[dict[str, object]]:
    """One row per seed and age of the plan, one per seed and number of steps that a plan serves."""
    cuda = torch.cuda.is_available()
    device, size = ("cuda", CUDA_SIZE) if cuda else ("cpu", CPU_SIZE)
    model = load_model().to(device, torch.bfloat16 if cuda else torch.float32)
    settings = Settings()
    for seed in SEEDS[:1] if quick else SEEDS:
        noise = torch.randn(1, CHANNELS, *size, generator=torch.Generator().manual_seed(seed)).to(device)
        context = conditioning(seed).to(device)
        shared = {
            "L": size[0] * size[1] * size[2] // 4,
            "M": settings.tile_queries,
            "N": settings.tile_keys,
            "threshold": settings.threshold,
            "steps": STEPS,
            "seed": seed,
        }
        aged = Aged(settings)
        latent = generate(model, noise, context, aged, STEPS)[0][0].float()
        frames = to_rgb(latent)
        for age, errors in aged.errors.items():
            yield {
                "case": "plan age",
                **shared,
                "plan_age": age,
                **summary(errors),
                "executed_density": torch.stack(aged.densities[age]).mean().item(),
            }
        for k in REUSE_STEPS[::3] if quick else REUSE_STEPS:
            engine = Watched(settings, Policy(min_tokens=1, reuse_steps=k))
            got, report = generate(model, noise, context, engine, STEPS)
            if report.failure or report.remarks or len(engine.errors) != report.count(Outcome.SPARSE):
                raise RuntimeError(f"not every call ran as wanted: {report.calls}, {report.failure}")
            got = got[0].float()
            yield {
                "case": "reuse",
                **shared,
                "reuse_steps": k,
                **summary(engine.errors),
                "latent_error": relative_error(got, latent),
                "psnr_db": psnr(to_rgb(got), frames),
                "executed_density": report.executed_density,
                "plans_made": report.plans["made"],
                "plans_reused": report.plans.get("reused", 0),
                "plans_not_kept": report.plans.get("not kept", 0),
                "planning_ms": report.planning,
                "planning_saved_ms": report.planning_saved,
            }


def error(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative L2 error, left on the device: reading it would leave gaps in what is timed."""
    return (got.float() - expected.float()).norm() / expected.float().norm()


def summary(errors: list[torch.Tensor]) -> dict[str, float]:
    every = torch.stack(errors)
    return {"attention_error": every.log().mean().exp().item(), "worst_attention_error": every.max().item()}
