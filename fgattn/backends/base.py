"""Backend: what the library needs to know of the code for one kind of device.

A backend is a folder with such a record, and a line in `registry`. No other code of the library names one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..call import Call
from ..plan import SparsePlan
from ..settings import Settings

# The partial softmax of what each query cell skips, in the order of execution: out [B, H, query cells, D] and
# log-sum-exp [B, H, query cells], fp32.
Tail = tuple[torch.Tensor, torch.Tensor]


class Planned(NamedTuple):
    """A plan, and what its backend made on the way that serves tail and attention of the same call.

    `made` is None for a plan that was made for an earlier call, by another method, or from a mask: tail and
    attention then make what they need.
    """

    plan: SparsePlan
    made: Any = None  # of a type that its backend knows


class Costs(NamedTuple):
    """Figures of a backend's calls on a GPU, from which `break_even` tells whether one gains."""

    rate: float  # of dense attention, operations a ms
    fixed: float  # ms of a sparse call, however short
    planning: float  # planning and tail, share of dense
    speed: float  # of the attention kernel at density 1, dense is 1
    host: float  # ms that the host takes to queue a sparse call


@dataclass(frozen=True, eq=False)
class Backend:
    """What computes sparse attention on some devices.

    An exception of `reason`, `gains_on` or `probe` is a reason why the backend cannot run the call.

    Attributes:
        name: for `impl` and for reports.
        reason: why it cannot run a call, or None; cheap, and does not wait for the device.
        plan: selects by threshold what of a call is computed. The call is not empty.
        tail: what a plan skips; None if `attend` computes it by itself.
        attend: writes the output [B, H, L_q, D] of a call under a plan, its tail joined in if there is one.
            It takes every plan of a call that `reason` lets through: any N, executed tiles of 64 or 128
            queries in the plan's `cell_order`, missing keys, bits that all batch rows or heads share.
            Rows of absent tokens are zeroed before.
        gains_on: whether a run can gain on a device. Elsewhere only library calls take the backend.
        costs: figures of a call on a GPU; None where no figures are known, and the call is taken to gain.
        probe: settings of the self-test that stands for a call; None for code that needs no test at first
            use.
        compiling: makes a context in which `plan`, `tail` and `attend` compile the kernels that they launch,
            side by side, and run none. What these would write is undefined then: tiles of `probe` have 64
            queries or more, so that no row is looked up by what planning writes. None without such kernels.
        tested: with what versions its kernels are tested, to be said where they fail their self-test.
    """

    name: str
    reason: Callable[[Call], str | None]
    plan: Callable[[Call], Planned]
    tail: Callable[[Call, Planned], Tail] | None
    attend: Callable[[Call, Planned, Tail | None, torch.Tensor], None]
    gains_on: Callable[[torch.device], bool]
    costs: Callable[[Call], Costs] | None = None
    probe: Callable[[Call], Settings] | None = None
    compiling: Callable[[], AbstractContextManager[None]] | None = None
    tested: str | None = None


@dataclass(frozen=True)
class Eligible:
    """The answer that a call can run sparse.

    Attributes:
        backend: that takes it.
        passed_over: (name, reason) of the backends that come before it and cannot.
    """

    backend: Backend
    passed_over: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """The backend, and why none that comes before it runs."""
        return self.backend.name + without(self.passed_over)


def without(passed_over: tuple[tuple[str, str], ...]) -> str:
    """ " (no hopper: reason)", or nothing."""
    return f" ({'; '.join(f'no {name}: {reason}' for name, reason in passed_over)})" if passed_over else ""
