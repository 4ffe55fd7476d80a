"""Every benchmark by name: its sources are functions of `quick` that yield cases or finished rows."""

from __future__ import annotations

from . import end2end, kernel, plan, quality

REGISTRY = {
    "kernel": (kernel.cases,),  # small_tiles.rows goes here: M = 16 and 32 on real masks
    "plan": (plan.cases,),
    "quality": (quality.cases,),
    "end2end": (end2end.cases,),
}
