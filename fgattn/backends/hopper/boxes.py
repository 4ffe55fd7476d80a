"""Boxes: octets of keys that TMA can bring at once, because they lie in memory as a box."""

from __future__ import annotations

import numpy as np
import torch

from ...call import Call

OCTET = 8  # key positions of a box
FLAT, WIDE, DEEP = 0, 1, 2  # kinds: 8 tokens of a row, 4 in two rows of a frame, 4 in two frames


def boxes_for(call: Call) -> torch.Tensor | None:
    """First token * 4 + kind of each octet of key positions, int32 [ceil(L_k / 8)].

    None where keys are brought row by row: slices are finer than octets, keys are missing, k or v is expanded
    along a dimension, or the tokens of an octet are no box.
    """
    if call.settings.tile_keys < OCTET or call.key_valid is not None:
        return None
    if any(_is_expanded(x) for x in (call.k, call.v) if x is not None):
        return None
    geometry = call.geometry

    def build() -> torch.Tensor | None:
        boxes = octet_boxes(geometry.host_tokens, geometry.grid)
        return None if boxes is None else torch.from_numpy(boxes).to(geometry.key_tokens.device)

    return geometry.table("boxes", build)


def _is_expanded(x: torch.Tensor) -> bool:
    """Whether rows lie on top of each other."""
    strides = x.stride()
    return 0 in strides and any(n > 1 and stride == 0 for n, stride in zip(x.shape, strides, strict=True))


def octet_boxes(tokens: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray | None:
    """First token * 4 + kind (FLAT, WIDE or DEEP) of each octet of positions; None if one is no box.

    Args:
        tokens: token at each position, int64 [L]. The box of a short last octet is FLAT and starts
            earlier, so that its last tokens are those of the octet.
        grid: (T, H, W) of the video: a row holds W tokens, a frame H * W.
    """
    (_, h, w), missing, four = grid, -len(tokens) % OCTET, np.arange(4)
    whole = tokens[: len(tokens) // OCTET * OCTET].reshape(-1, OCTET)
    short = tokens[len(whole) * OCTET :]
    if missing:
        whole = np.vstack((whole, short[0] - missing + np.arange(OCTET)))
        if short[0] < missing or (short != whole[-1, missing:]).any():
            return None
    place, kinds = whole - whole[:, :1], np.full(len(whole), -1)
    for kind, step in ((DEEP, h * w), (WIDE, w), (FLAT, 4)):
        kinds[(place == np.r_[four, step + four]).all(1)] = kind
    return None if (kinds < 0).any() else (whole[:, 0] * 4 + kinds).astype(np.int32)
