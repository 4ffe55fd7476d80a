"""Which step of its schedule a sampler is in, from the order of its evaluations and their levels together.

Neither is enough. Samplers evaluate once a step, or twice, or go back; and they tell the model levels that
are not the schedule's: halfway ones, with noise added before (s_churn), or less than there is, for detail.
"""

from __future__ import annotations

from collections.abc import Sequence

ROUNDING = 1e-4  # relative: levels that are this close are the same
HONEST = 1e-3  # some samplers begin this little below the first level, for numerical reasons
SHIFTS = (0.7, 1.5)  # times the first level, between which a first evaluation is of step 0; s_churn: 1.414
NEAR = 0.7  # times the next step's level, down to which an evaluation may be of that step


class Steps:
    """Follows a sampler through its schedule; `step` is where it is.

    - The first evaluation is of step 0; by what factor its level is off, so are all others.
    - At a level of the schedule it is that level's step; of steps that share a level, the next one.
    - Between two levels, a halfway evaluation, it is the step that begins at the upper one.
    - No step is passed over, unless by two levels of the schedule in succession, or to a far lower level.

    Args:
        sigmas: noise levels, one more than steps.
    """

    def __init__(self, sigmas: Sequence[float]):
        self._levels = tuple(sigmas[:-1])
        self._factor: float | None = None  # of the sampler's levels against the schedule's
        self._next = 0  # after the furthest step that was reached
        self._at_level = True  # of the schedule was the evaluation before
        self.step = 0

    def evaluated(self, sigma: float) -> int:
        """The step of the evaluation that begins at this level."""
        if self._levels:
            if self._factor is None:
                self._factor = self._first(sigma)
            self.step = self._of(sigma / self._factor)
            self._next = max(self._next, self.step + 1)
        return self.step

    def _first(self, sigma: float) -> float:
        """What the first evaluation tells of the factor."""
        factor = sigma / self._levels[0] if self._levels[0] > 0 else 1.0
        is_off = SHIFTS[0] <= factor <= SHIFTS[1] and not 1 - HONEST <= factor <= 1 + ROUNDING
        return factor if is_off else 1.0

    def _of(self, sigma: float) -> int:
        """The step of a level from which the factor is taken out."""
        equal = [i for i, level in enumerate(self._levels) if abs(level - sigma) <= ROUNDING * level]
        trusted, self._at_level = self._at_level, bool(equal)
        if equal and (trusted or equal[0] <= self._next):
            return max((i for i in equal if i <= self._next), default=equal[0])
        reached = self._levels[: self._next + 1]
        if sigma < NEAR * min(reached):
            reached = self._levels
        return max((i for i, level in enumerate(reached) if level >= sigma), default=0)
