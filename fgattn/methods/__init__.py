"""The registry of selection methods; `plan_from_mask` takes everything else.

"threshold", the default, is planned by the backends themselves. The others are torch code on any device, one
file each with the source, the rule, and what in it is our reading. They run at any M x N, with sinks and in
any order; what the project always keeps (sinks, a tile's own cells) is added to what they select.
"""

from __future__ import annotations

import torch

from ..errors import InvalidArgument, is_number
from ..layout import CELL
from . import hierarchical, radial, sol, top_k
from .common import Heads, folded

METHODS = {
    "top_k": top_k.METHOD,
    "sol": sol.METHOD,
    "hierarchical": hierarchical.METHOD,
    "radial": radial.METHOD,
}
METHOD_NAMES = ("threshold", *METHODS)


def check(method: str, parameter: float) -> None:
    """Raise InvalidArgument unless this is a method and a strength it takes."""
    if not isinstance(method, str) or method not in METHOD_NAMES:
        raise InvalidArgument("method", method, ", ".join(METHOD_NAMES), "threshold is the default.")
    if method == "threshold":  # has no use for it, as the others have none for the threshold
        if not is_number(parameter):
            raise InvalidArgument("method_parameter", parameter, "a finite number", "0 is the default.")
        return
    rule = METHODS[method]
    if not is_number(parameter) or not 0 <= parameter <= rule.most:
        raise InvalidArgument(
            "method_parameter",
            parameter,
            f"above 0 up to {rule.most:g} with {method} ({rule.parameter})",
            f"0 chooses {rule.default:g}.",
        )


def strength(method: str, parameter: float) -> float:
    """The parameter that takes effect; 0 chooses the method's own default."""
    return parameter or METHODS[method].default


def select(name: str, heads: Heads) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept slices, bool [G, tiles, slices], and what tiles are joined by: the same, or cells where N < 16."""
    geo, n, m = heads.geometry, heads.tile_keys, heads.tile_queries
    always = geo.table(("always kept", m), lambda: geo.always_kept(m))
    always = heads.in_slices(always & (heads.keys_in(CELL) > 0))
    kept = (METHODS[name].select(heads) | always) & (heads.keys_in(n) > 0)
    kept = kept.expand(len(heads.q), -1, -1)
    return kept, kept if n >= CELL else folded(kept, CELL // n).any(3)
