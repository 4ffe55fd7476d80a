"""Every benchmark by name: its sources are functions of `quick` that yield cases or finished rows."""

from __future__ import annotations

from . import end2end, generations, kernel, methods, plan, quality, reuse, small_tiles

REGISTRY = {
    "kernel": (kernel.cases, small_tiles.cases),
    "plan": (plan.cases,),
    "quality": (quality.cases,),
    "generations": (generations.rows,),
    "end2end": (end2end.cases,),
    "methods": (methods.cases,),
    "reuse": (reuse.rows,),
}
