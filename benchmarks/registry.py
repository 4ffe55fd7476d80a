"""Every benchmark by name: its sources are functions of `quick` that yield cases or finished rows."""

from __future__ import annotations

from . import breakeven, end2end, first_use, generations, kernel, methods, plan, quality, reuse, small_tiles

REGISTRY = {
    "kernel": (kernel.cases, small_tiles.cases),
    "plan": (plan.cases,),
    "quality": (quality.cases,),
    "generations": (generations.rows,),
    "end2end": (end2end.cases,),
    "methods": (methods.cases,),
    "reuse": (reuse.rows,),
    "breakeven": (breakeven.cases,),
    "first_use": (first_use.rows,),
}
