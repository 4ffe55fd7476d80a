"""The attention override: ComfyUI's attention calls on their way to an engine, or past it."""

import dataclasses
import functools
import threading

import torch
from einops import rearrange

from ..fgattn.outcomes import Reason
from ..fgattn.runs.engine import Engine
from .models import NO_GRID, call_block, call_branch, call_layout, valid_keys, without_padding


class Override:
    """The attention override of one engine, chained to the one it found.

    Args:
        engine: that takes the calls.
        thread: of this thread's model evaluation: `video`, its token grid; `mask`, the last one that was read
            and what it means; `inside`, whether a call is on its way already.
        previous: the override that was there, or None; it gets the calls that are left dense.
    """

    def __init__(self, engine: Engine, thread: threading.local, previous):
        self.engine, self.thread, self.previous = engine, thread, previous

    @torch.compiler.disable
    def __call__(
        self,
        func,
        q,
        k,
        v,
        heads,
        mask=None,
        attn_precision=None,
        skip_reshape=False,
        skip_output_reshape=False,
        **kwargs,
    ):
        """ComfyUI's contract: q, k, v [B, L, H*D], or [B, H, L, D] with skip_reshape."""
        options = kwargs.get("transformer_options") or {}

        def fallback():
            call = functools.partial(self.previous, func) if self.previous else func
            return call(
                q,
                k,
                v,
                heads,
                mask=mask,
                attn_precision=attn_precision,
                skip_reshape=skip_reshape,
                skip_output_reshape=skip_output_reshape,
                **kwargs,
            )

        thread = self.thread
        if getattr(thread, "inside", False):  # reached through a foreign override
            return fallback()
        thread.inside = True
        try:
            length = 2 if skip_reshape else 1
            video = getattr(thread, "video", None)
            layout = call_layout(options, video, q.shape[length], k.shape[length])
            if not isinstance(layout, Reason) and mask is not None:
                layout = self._masked(mask, layout, q.shape[0])
            if isinstance(layout, Reason):
                self.engine.decline(layout)
                return fallback()
            if video is None:
                self.engine.remark(NO_GRID)
            split = functools.partial(rearrange, pattern="b l (h d) -> b h l d", h=heads)
            out = self.engine.attention(
                *((q, k, v) if skip_reshape else map(split, (q, k, v))),
                layout=layout,
                dense=(fallback if skip_output_reshape else lambda: split(fallback())),
                block=call_block(options, video),
                branch=call_branch(options),
                scale=kwargs.get("scale"),
            )
            return out if skip_output_reshape else rearrange(out, "b h l d -> b l (h d)")
        finally:
            thread.inside = False

    def _masked(self, mask, layout, batch):
        """The layout under a mask, or why there is none. Read once an evaluation: that waits."""
        thread, place = self.thread, (layout.grid, layout.front, layout.back, batch)
        known = getattr(thread, "mask", None)
        if known is None or known[0] is not mask or known[1] != place:
            valid = valid_keys(mask, batch, layout.length)
            found = valid if isinstance(valid, Reason) else dataclasses.replace(layout, key_valid=valid)
            if isinstance(valid, torch.Tensor):
                found = without_padding(layout, valid) or found
            known = thread.mask = mask, place, found
        return known[2]
