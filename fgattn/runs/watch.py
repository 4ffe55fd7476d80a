"""Watches the calls of a run for people who want to know more than the time: maps and estimated errors.

The engine tells it what became of each call. It changes no output, and a failure of it costs no render.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from ..call import Call, needed
from ..outcomes import Reason
from ..plan import SparsePlan
from .estimate import Estimate
from .maps import Maps, Place
from .stats import UNKNOWN_BLOCK, CallPlace, RunStats

log = logging.getLogger("fgattn")


class Watch:
    """What is looked at in one run. A failure here ends the looking, not the run.

    Args:
        stats: of the run.
        places: of the tiles that maps are of, see `Maps`.
        estimate_error: compare some calls with dense attention.
        passthrough: exceptions that must reach the caller.
    """

    def __init__(
        self,
        stats: RunStats,
        places: Mapping[str, Place],
        estimate_error: bool,
        passthrough: tuple[type[BaseException], ...],
    ):
        self.maps = Maps(places)
        self._stats, self._passthrough = stats, passthrough
        self._estimate = Estimate() if estimate_error else None
        self._on = True

    def dense(self, at: CallPlace, reason: Reason) -> None:
        """A call was dense."""
        self._guarded(lambda: self.maps.skip(at.step, at.block, reason))

    def sparse(self, at: CallPlace, call: Call, out: torch.Tensor, plan: SparsePlan | Reason) -> None:
        """A call was sparse, with this plan; or why there is no plan of the whole call."""
        if call.is_empty:
            return

        def look():
            if isinstance(plan, Reason):
                self.maps.skip(at.step, at.block, plan)
            else:
                self.maps.keep(at.step, at.block, plan, needed(call.layout), call.settings.order)
            if self._estimate and self._estimate.due(at.step, at.block, call):
                self._stats.add_estimate(
                    at.step,
                    UNKNOWN_BLOCK if at.block is None else at.block,
                    self._estimate.estimated_error(call, out),
                )

        self._guarded(look)

    def end(self) -> Maps | None:
        """The run's maps on the host, if there is memory to bring them there; waits for the device."""
        try:
            self.maps.to_host()
        except Exception:
            log.exception("FG-Attn lost the maps of this run")
            return None
        return self.maps

    def _guarded(self, look: Callable[[], None]) -> None:
        if not self._on:
            return
        try:
            look()
        except self._passthrough:
            raise
        except Exception as error:
            self._on = False
            self._stats.remarks[f"no more maps and error estimates: {type(error).__name__}: {error}"] = None
            log.exception("FG-Attn takes no more maps and error estimates in this run")
