"""What the user chooses: the attention settings and the policy that says when they apply."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from . import methods
from .errors import InvalidArgument, check_type, is_number

TILE_QUERIES = (16, 32, 64, 128)
TILE_KEYS = (1, 2, 4, 8, 16, 32, 64, 128)
ORDERS = ("cells", "raster", "hilbert")
MOST = 10**9  # of any whole number
LAST_BLOCK = 9999
MARGIN = 1e-3  # a logit that equals the bound but for rounding is kept


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one attention call selects what it computes.

    Attributes:
        threshold: keep what is expected to get at least this multiple of the uniform probability
            1/L_k; 0 keeps everything. 0.7 to 2 is the useful range.
        tile_queries: M, queries that share one selection.
        tile_keys: N, consecutive keys that are kept or skipped together.
        tail: add a pooled estimate of what is skipped.
        order: token order, "cells" (compact 3-D cells of 16 tokens), "raster" or "hilbert".
        method: selection rule; the other ones of `methods` do not use `threshold`.
        method_parameter: strength of such a method; 0 chooses its own default.
    """

    threshold: float = 1.0
    tile_queries: int = 128
    tile_keys: int = 16
    tail: bool = True
    order: str = "cells"
    method: str = "threshold"
    method_parameter: float = 0.0

    def __post_init__(self):
        if not is_number(self.threshold) or self.threshold < 0:
            raise InvalidArgument(
                "threshold",
                self.threshold,
                "a finite number of at least 0",
                "1.0 is a good start; 0 keeps everything.",
            )
        object.__setattr__(self, "threshold", float(self.threshold))  # of any kind of number
        _one_of("tile_queries", self.tile_queries, TILE_QUERIES, "128 is the fastest.")
        _one_of("tile_keys", self.tile_keys, TILE_KEYS, "16 is a good start.")
        _one_of("order", self.order, ORDERS, "Use cells for video.")
        check_boolean("tail", self.tail)
        methods.check(self.method, self.method_parameter)
        object.__setattr__(self, "method_parameter", float(self.method_parameter))

    def log_bound(self, keys: int) -> float:
        """What is added to a log-sum-exp over `keys` keys for the smallest logit that the threshold keeps."""
        return (math.log(self.threshold) if self.threshold else -math.inf) - math.log(keys) - MARGIN

    @property
    def strength(self) -> float:
        """The threshold, or the parameter of another method that is in force."""
        if self.method == "threshold":
            return self.threshold
        return methods.strength(self.method, self.method_parameter)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When attention may run sparse.

    Attributes:
        warmup_steps: dense steps at the start of a run that begins at full noise; at most a quarter
            of the run's steps takes effect.
        final_dense_steps: dense steps at the end of a run that ends without noise.
        dense_blocks: transformer blocks that stay dense.
        min_tokens: shortest sequence that runs sparse; 0 chooses by device.
        reuse_steps: steps that a plan serves; 1 makes one for every call.
        reuse_memory_mb: most memory of kept plans, in 10^6 bytes; when it is full, no plan is added.
        estimate_error: compare a few query rows of some calls with dense attention.
    """

    warmup_steps: int = 2
    final_dense_steps: int = 0
    dense_blocks: frozenset[int] = frozenset()
    min_tokens: int = 0
    reuse_steps: int = 1
    reuse_memory_mb: int = 1200  # 1 118 for Wan 14B at 720p, 81 frames, N = 16, both branches
    estimate_error: bool = True

    def __post_init__(self):
        for name in ("warmup_steps", "final_dense_steps", "min_tokens", "reuse_memory_mb"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= MOST:
                raise InvalidArgument(name, value, f"a whole number from 0 to {MOST}", "Use 0 for none.")
        if type(self.reuse_steps) is not int or not 1 <= self.reuse_steps <= MOST:
            raise InvalidArgument(
                "reuse_steps",
                self.reuse_steps,
                f"a whole number from 1 to {MOST}",
                "Use 1 for a fresh plan in every call.",
            )
        check_boolean("estimate_error", self.estimate_error)
        blocks = self.dense_blocks
        if not isinstance(blocks, frozenset) or not all(map(is_block, blocks)):
            raise InvalidArgument(
                "dense_blocks",
                blocks,
                f"a frozenset of whole numbers from 0 to {LAST_BLOCK}",
                "Use parse_blocks for text.",
            )


def is_block(value: object) -> bool:
    """Whether this can be the number of a transformer block."""
    return type(value) is int and 0 <= value <= LAST_BLOCK


def parse_blocks(text: str) -> frozenset[int]:
    """Block numbers of a list like "0, 1, 38-39"; empty text is no block.

    Raises:
        InvalidArgument: for anything else, naming the part that is wrong.
    """
    check_type("dense_blocks", text, str, 'Write block numbers such as "0, 1, 38-39".')
    blocks: set[int] = set()
    for part in text.split(",") if text.strip() else []:
        match = re.fullmatch(r"\s*([0-9]{1,4})\s*(?:-\s*([0-9]{1,4})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise InvalidArgument(
                "dense_blocks",
                part.strip(),
                'block numbers and rising ranges such as "0, 1, 38-39"',
                "Separate them with commas, or leave the field empty.",
            )
        blocks.update(range(first, last + 1))
    return frozenset(blocks)


def ranges(blocks: Collection[int]) -> str:
    """A text that `parse_blocks` reads as these blocks: such as "0, 2-5"."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _one_of(name: str, value: object, allowed: tuple, remedy: str) -> None:
    if type(value) is not type(allowed[0]) or value not in allowed:  # 64.0 and True are no tile sizes
        raise InvalidArgument(name, value, ", ".join(map(str, allowed)), remedy)


def check_boolean(name: str, value: object) -> None:
    """Raise InvalidArgument for anything but True and False."""
    if not isinstance(value, bool):
        raise InvalidArgument(name, value, "True or False", "Pass a boolean.")
