"""The registry of selection methods; `plan_from_mask` takes everything else.

"threshold", the default, is `selection` and its kernels. The others are torch code on any device, one file
each with the source, the rule, and what in it is our reading. They run at any M x N, with sinks and in any
order; what the project always keeps (sinks, a tile's own cells) is added to what they select.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import InvalidArgument
from ..layout import CELL, Geometry, TokenLayout
from . import hierarchical, radial, sol, top_k
from .common import Call, grouped

if TYPE_CHECKING:
    from ..settings import Settings

METHODS = {"top_k": top_k.METHOD, "sol": sol.METHOD, "hierarchical": hierarchical.METHOD,
           "radial": radial.METHOD}
METHOD_NAMES = ("threshold", *METHODS)


def check(method: str, parameter: float) -> None:
    """Raise InvalidArgument unless this is a method and a strength it takes."""
    if not isinstance(method, str) or method not in METHOD_NAMES:
        raise InvalidArgument("method", method, ", ".join(METHOD_NAMES), "threshold is the default.")
    number = isinstance(parameter, (int, float)) and not isinstance(parameter, bool)
    if method == "threshold":
        if not number or parameter != 0:
            raise InvalidArgument("method_parameter", parameter, "0 with method threshold",
                                  "Its strength is `threshold`.")
        return
    rule = METHODS[method]
    if not number or not 0 <= parameter <= rule.most:
        raise InvalidArgument(
            "method_parameter", parameter, f"above 0 up to {rule.most:g} with {method} ({rule.parameter})",
            f"0 chooses {rule.default:g}.")


def strength(method: str, parameter: float) -> float:
    """The parameter that takes effect; 0 chooses the method's own default."""
    return parameter or METHODS[method].default


def select(
    q: torch.Tensor, k: torch.Tensor, valid: torch.Tensor | None, geo: Geometry, layout: TokenLayout,
    settings: Settings, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `selection.select`, by the method of the settings."""
    name, n = settings.method, settings.tile_keys
    call = Call(q, k, valid, geo, layout, settings.tile_queries, n,
                strength(name, settings.method_parameter), scale)
    always = call.in_slices(geo.always_kept(settings.tile_queries) & (call.keys_in(CELL) > 0))
    kept = (METHODS[name].select(call) | always) & (call.keys_in(n) > 0)
    kept = kept.expand(len(q), -1, -1)
    return kept, kept if n >= CELL else grouped(kept, CELL // n).any(3)
