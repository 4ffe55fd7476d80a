"""Call: one attention call on its way from a caller to the kernels."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from .errors import InvalidArgument, check_type, is_number
from .layout import Geometry, TokenLayout, geometry
from .plan import SparsePlan
from .settings import Settings
from .tensors import check_tensors, compute_type, declined

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Call:
    """softmax(scale * q k^T) v, and what of it shall be computed.

    | attribute | type | meaning |
    |---|---|---|
    | q | [B, H, L_q, D] | queries |
    | k, v | [B, H, L_k, D] | keys and values; v may be None where only a plan is wanted |
    | settings | Settings | tile sizes, selection method and its strength, tail, order |
    | geometry | Geometry | where queries and keys stand in that order |
    | key_valid | None or [B, L_k] bool | keys that exist, in the order |
    | layout | TokenLayout or None | as the caller gave it; None under a plan that was given |
    | scale | float | softmax scale |
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor | None
    settings: Settings
    geometry: Geometry
    key_valid: torch.Tensor | None
    layout: TokenLayout | None
    scale: float

    @classmethod
    def to_plan(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | None,
        settings: Settings,
        layout: TokenLayout,
        scale: float | None = None,
    ) -> Call:
        """A call that is planned by these settings.

        Args:
            layout: of the keys; `layout.length` must be L_k.
            scale: D**-0.5 if None.

        Raises:
            InvalidArgument: shapes, types and layout that do not fit together; a scale that is not finite.
        """
        check_tensors(q, k, k if v is None else v)
        check_type("settings", settings, Settings, "Settings() has the defaults.")
        check_type("layout", layout, TokenLayout, "TokenLayout.flat(L_k) has no grid.")
        scale = checked_scale(scale)
        valid = ordered_valid(layout, len(q), k.shape[2], settings.order, q.device)
        geo = geometry(layout, settings.order, q.shape[2], q.device)
        return cls(q, k, v, settings, geo, valid, layout, q.shape[3] ** -0.5 if scale is None else scale)

    @classmethod
    def under(cls, plan: SparsePlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
        """A call under a plan that is there already.

        Raises:
            InvalidArgument: shapes, types and devices that do not fit together or to the plan.
        """
        check_tensors(q, k, v)
        check_type("plan", plan, SparsePlan, "build_plan and plan_from_mask make one.")
        if plan.bits.device != q.device:
            raise InvalidArgument(
                "device of the plan",
                str(plan.bits.device),
                f"{q.device}, where q, k and v are",
                "Build the plan from tensors, or a mask, on that device.",
            )
        fits = all(n in (1, m) for n, m in zip(plan.bits.shape[:2], q.shape[:2], strict=True))
        if not fits or plan.geometry.rows != (q.shape[2], k.shape[2]):
            raise InvalidArgument(
                "[B, H, L_q, L_k]",
                (*q.shape[:3], k.shape[2]),
                f"{(*plan.bits.shape[:2], *plan.geometry.rows)} of the plan (B and H may be 1 there)",
                "Build a plan for these tensors; a mask needs query_length and key_length if its last "
                "tiles are short.",
            )
        settings = Settings(tile_queries=plan.tile_rows, tile_keys=plan.tile_keys, tail=plan.tail)
        return cls(q, k, v, settings, plan.geometry, plan.key_valid, None, plan.softmax_scale(q.shape[3]))

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def queries(self) -> int:
        """Queries that are not absent."""
        return self.geometry.query_tokens.shape[0]

    @property
    def keys(self) -> int:
        """Keys that are not absent."""
        return self.geometry.key_tokens.shape[0]

    @property
    def is_empty(self) -> bool:
        return not (self.q.numel() and self.queries and self.keys)

    @functools.cached_property
    def declined(self) -> str | None:
        """Why no backend takes these tensors, or None."""
        return declined(self.q, self.k, self.k if self.v is None else self.v)

    @functools.cached_property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """q, k, v in the type that products are computed in."""
        kind = compute_type(self.q)
        return self.q.to(kind), self.k.to(kind), self.v if self.v is None else self.v.to(kind)

    def of_heads(self, heads: slice) -> Call:
        """The same call for some of the heads."""
        v = self.v if self.v is None else self.v[:, heads]
        return replace(self, q=self.q[:, heads], k=self.k[:, heads], v=v)

    def in_parts(self, parts: int) -> Iterator[tuple[slice, Call]]:
        """The heads in that many parts of nearly equal size, and the call of each."""
        heads = self.q.shape[1]
        for i in range(parts):
            part = slice(heads * i // parts, heads * (i + 1) // parts)
            yield part, self.of_heads(part) if parts > 1 else self


def checked_scale(scale: float | None) -> float | None:
    """A softmax scale as a plain number; None stays None.

    Raises:
        InvalidArgument: anything but a finite number.
    """
    if scale is None:
        return None
    if not is_number(scale):
        raise InvalidArgument("scale", scale, "a finite number", "None is D**-0.5.")
    return float(scale)


def needed(value: T | None) -> T:
    """A part of a call that may be None elsewhere, such as `layout`, and is needed here."""
    if value is None:
        raise TypeError("a call lacks what is needed here")
    return value


def ordered_valid(
    layout: TokenLayout, batch: int, keys: int, order: str, device: torch.device
) -> torch.Tensor | None:
    """`layout.key_valid` in the order, bool [B, L_k].

    Raises:
        InvalidArgument: a layout that is not one of `keys` keys and `batch` rows.
    """
    if layout.length != keys:
        raise InvalidArgument(
            "layout.length", layout.length, f"L_k = {keys}", "Count every token: front + T*H*W + back."
        )
    valid = layout.key_valid
    if valid is None:
        return None
    if valid.dtype != torch.bool or tuple(valid.shape) != (batch, keys):
        raise InvalidArgument(
            "layout.key_valid",
            (valid.dtype, tuple(valid.shape)),
            f"bool {(batch, keys)}",
            "Give one row per batch row.",
        )
    if valid.is_meta and device.type != "meta":
        raise InvalidArgument(
            "layout.key_valid", "a tensor on meta", f"values, such as on {device}", "Give it values."
        )
    tokens = geometry(replace(layout, query_start=None), order, 0, device).key_tokens
    return valid.to(device)[:, tokens]
