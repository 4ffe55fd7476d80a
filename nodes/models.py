"""What is known of a model's attention calls: the video's token grid, what is beside it, block, branch."""

import dataclasses
import math
from collections.abc import Hashable
from typing import NamedTuple

import torch

from ..fgattn.layout import TokenLayout
from ..fgattn.outcomes import Outcome, Reason

# Where tokens that are not of the video (text, reference, audio, pose, guides) stand in self-attention, by
# class of the diffusion model or its nearest known ancestor.
SIDES = {
    "WanModel": "front",
    "CausalWanModel": "front",
    "WanModel_S2V": "back",
    "HumoWanModel": "back",
    "SCAILWanModel": "back",
    "HunyuanVideo": "front",
    "Kandinsky5": "front",
    "LTXBaseModel": "back",
    "GeneralDIT": "back",
    "MiniTrainDIT": "back",
    "AsymmDiTJoint": "back",
    "Flux": "front",
    "QwenImageTransformer2DModel": "front",
    "MiniMaxH3Model": "front",
}
INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "module", "__wrapped__")  # where wrappers have their model
MASKED = -1e4  # a bias below this removes a key
NO_GRID = "this model's token grid is not known: sparse in raster order, without sinks"


class Video(NamedTuple):
    """The video tokens of one model evaluation."""

    grid: tuple[int, int, int]  # (T, H, W)
    side: str  # where other tokens stand, "front" or "back"
    double_blocks: int  # blocks that are counted before the single ones
    guide_frames: int = 0  # at the end of the grid; the model may leave out tokens of these


def video_of(diffusion_model, latent_shape, guide_tokens: int = 0) -> Video | None:
    """Video tokens of a model for a latent [B, C, T, H, W] or [B, C, H, W]; None for unknown models.

    Args:
        diffusion_model: as ComfyUI calls it; may be inside wrappers, such as that of torch.compile.
        guide_tokens: that stand for guides of LTX models, at the end of the latent.
    """
    diffusion_model = unwrapped(diffusion_model)
    known = _known(diffusion_model)
    patch = _patch_size(diffusion_model) if known else None
    if patch is None or len(latent_shape) not in (4, 5):
        return None
    sizes = (1, *latent_shape[2:])[-3:]
    t, h, w = (-(-int(n) // p) for n, p in zip(sizes, patch, strict=True))
    blocks = len(getattr(diffusion_model, "double_blocks", ()))
    return Video((t, h, w), SIDES[known[0]], blocks, guide_tokens // (h * w))


def unwrapped(model):
    """The model inside all wrappers; the outermost known one."""
    seen: list = []
    while not _known(model):
        seen.append(model)
        inner = _inside(model)
        if inner is None or any(inner is one for one in seen):
            break
        model = inner
    return model


def _inside(model):
    """What a wrapper wraps, under a usual name or as its only part; None where the model is no wrapper."""
    named = [inner for name in INSIDE if (inner := getattr(model, name, None)) is not None]
    parts = list(model.children()) if isinstance(model, torch.nn.Module) else []
    return named[0] if named else parts[0] if len(parts) == 1 else None


def _known(model) -> list[str]:
    """Names of the classes in SIDES that a model is of, the nearest first."""
    return [c.__name__ for c in type(model).__mro__ if c.__name__ in SIDES]


def call_layout(
    options: dict, video: Video | None, query_length: int, key_length: int
) -> TokenLayout | Reason:
    """Layout of a self-attention call over the video tokens, or the reason why it is none.

    Args:
        options: the call's `transformer_options`; `grid_sizes` of Wan models knows more than the latent,
            `minimax_h3_layout` is of the whole packed sequence.
    """
    if query_length != key_length:
        return Reason(Outcome.CROSS_ATTENTION)
    packed = options.get("minimax_h3_layout")
    if packed is not None and packed.seq_len != query_length:
        return Reason(Outcome.OTHER_TOKENS)
    if video is None:
        return TokenLayout.flat(query_length)
    grid = options.get("grid_sizes")
    grid = video.grid if grid is None else tuple(int(n) for n in grid)
    if query_length < math.prod(grid):  # guides on a smaller grid: what is kept of them stands behind
        grid = (grid[0] - video.guide_frames, *grid[1:])
    others = query_length - math.prod(grid)
    if others < 0 or not grid[0]:
        return Reason(Outcome.OTHER_TOKENS)
    if others > math.prod(grid):
        return Reason(
            Outcome.LITTLE_VIDEO, f"{query_length} tokens, of which the video has {math.prod(grid)}"
        )
    return TokenLayout(grid, **{video.side: others})


def call_block(options: dict, video: Video | None) -> int | None:
    """Number of the transformer block that calls, single ones after double ones, if the model reports it."""
    block = options.get("block_index")
    if not isinstance(block, int):
        return None
    if video is not None and options.get("block_type") == "single":
        block += video.double_blocks
    return block


def call_branch(options: dict) -> Hashable | None:
    """Conditionings (one per part of the batch) and context window of a call; None if not reported."""
    uuids, window = options.get("uuids"), options.get("context_window")
    if not uuids or (window is not None and not hasattr(window, "index_list")):
        return None
    return tuple(uuids), window and tuple(window.index_list)


def valid_keys(mask: torch.Tensor, batch: int, keys: int) -> torch.Tensor | Reason | None:
    """Keys that a mask leaves, bool [B, L_k]; None if all; or why the mask is not one over keys alone.

    Reads the mask, so it waits for the device.

    Args:
        mask: bool (True keeps) or added to the scores: [B or 1, L_k], or with query and head dimensions of 1.
    """
    *rows, width = mask.shape
    if width != keys or any(n != 1 for n in rows[1:]) or (rows and rows[0] not in (1, batch)):
        return Reason(Outcome.MASK)
    mask = mask.reshape(-1, keys)
    valid = mask.clone() if mask.dtype == torch.bool else mask > MASKED  # kept longer than the mask
    if mask.dtype != torch.bool and (mask[valid] != 0).any():
        return Reason(Outcome.BIAS)
    if not valid.any(1).all():
        return Reason(Outcome.NO_KEY)
    return None if valid.all() else valid.expand(batch, keys)


def without_padding(layout: TokenLayout, valid: torch.Tensor) -> TokenLayout | None:
    """The layout with padding as absent tokens; None where rows differ or the video itself has padding.

    Reads the mask, as `valid_keys` does.

    Args:
        valid: bool [B, L], keys that a mask leaves.
    """
    row, end = valid[0], layout.length - layout.back
    if (valid != row).any() or not row[layout.front : end].all():
        return None
    return dataclasses.replace(layout, absent=tuple((~row).nonzero().flatten().tolist()))


def _patch_size(model) -> tuple[int, int, int] | None:
    """(T, H, W) latent values of a token."""
    size = getattr(model, "patch_size", None)
    if size is None and hasattr(model, "patchifier"):
        size = model.patchifier.patch_size
    if size is None and hasattr(model, "patch_spatial"):
        size = (model.patch_temporal, model.patch_spatial, model.patch_spatial)
    if isinstance(size, int):
        size = (size, size)
    if size is None or not 2 <= len(size) <= 3:
        return None
    t, h, w = (1, *(int(n) for n in size))[-3:]
    return t, h, w
