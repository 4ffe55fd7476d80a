"""What can become of an attention call: the keys of counters, maps and reports, with texts for people."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    """What became of an attention call; the value is its text.

    Code asks for members, never for texts. `code` is what the page is told.
    """

    SPARSE = "sparse"

    # Dense: the call is none that the engine takes.
    CROSS_ATTENTION = "cross-attention"
    OTHER_TOKENS = "self-attention of other tokens"
    LITTLE_VIDEO = "most tokens are not of the video"
    MASK = "attention mask"
    BIAS = "attention bias"
    NO_KEY = "attention mask that leaves no key"
    CAPTURED = "recorded as a CUDA graph"

    # Dense: it cannot run sparse, or would not be faster.
    NO_KERNEL = "no sparse kernel on this device"
    OTHER_GPU = "on another GPU than the run"
    DECLINED = "tensors that are not taken"
    MIN_TOKENS = "fewer than min_tokens"
    TOO_SHORT = "too few tokens for sparse to be faster"
    TOO_DENSE = "too many scores kept for sparse to be faster"

    # Dense: the user or the run wants it so.
    WARM_UP = "warm-up step"
    FINAL_STEP = "final dense step"
    DENSE_BLOCK = "listed in dense_blocks"
    FAILED = "error"
    AFTER_FAILURE = "after an error"

    # Sparse, but without a map.
    IN_PARTS = "heads were taken in parts, to save memory"
    MAPS_FULL = "the memory for maps was full; tile_keys of 16 or more needs less"

    @property
    def code(self) -> str:
        """Name for other programs; stays when the text changes."""
        return self.name.lower()

    @property
    def could_run(self) -> bool:
        """Whether a dense call could have run sparse: its time is compared with that of sparse ones."""
        return self in (
            Outcome.WARM_UP,
            Outcome.FINAL_STEP,
            Outcome.DENSE_BLOCK,
            Outcome.TOO_DENSE,
            Outcome.AFTER_FAILURE,
        )


@dataclass(frozen=True)
class Reason:
    """An outcome, with what only this call or device can tell.

    Attributes:
        detail: a text in place of the outcome's own, where it has numbers or names; else "".
    """

    outcome: Outcome
    detail: str = ""

    @property
    def text(self) -> str:
        return self.detail or self.outcome.value
