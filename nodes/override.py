"""The attention override: ComfyUI's attention calls on their way to an engine, or past it."""

import dataclasses
import threading
import weakref
from collections.abc import Callable

import torch

from ..fgattn.layout import TokenLayout
from ..fgattn.outcomes import Outcome, Reason
from ..fgattn.runs.engine import Engine
from .attention_call import AttentionCall
from .models import NO_GRID, call_block, call_branch, call_layout, valid_keys, without_padding


class Override:
    """The attention override of one engine, chained to the one it found.

    Args:
        engine: that takes the calls.
        thread: of this thread's model evaluation: `video`, its token grid; `mask`, the last one that was read
            and what it means; `inside`, whether a call is on its way already.
        previous: the override that was there, or None; it gets the calls that are left dense.
        outside: called where a call comes while the engine has no run.
    """

    def __init__(
        self, engine: Engine, thread: threading.local, previous, outside: Callable[[], None] = lambda: None
    ):
        self.engine, self.thread, self.previous, self.outside = engine, thread, previous, outside

    def __deepcopy__(self, memo) -> "Override":
        """Copies of a model share its engine, as clones do."""
        return self

    @torch.compiler.disable
    def __call__(self, func, q, k, v, heads, *args, **kwargs):
        """ComfyUI's contract: q, k, v [B, L, H*D], or [B, H, L, D] with skip_reshape."""
        return self._attention(AttentionCall(func, (q, k, v), heads, *args, **kwargs))

    @torch.compiler.disable
    def container_function(self, q, k, v, heads, *args, **kwargs):
        """The same where newer releases hand over q, k and v in containers; these do not tell the backend."""
        return self._attention(AttentionCall(None, (q, k, v), heads, *args, **kwargs))

    def _attention(self, call: AttentionCall) -> torch.Tensor:
        """The call's output. Nothing here may hold q, k or v: a dense call's backend frees them early."""
        thread = self.thread
        if getattr(thread, "inside", False):  # reached through a foreign override
            return call.dense(self.previous)
        if self.engine.run is None:
            self.outside()
            return call.dense(self.previous)
        thread.inside = True
        try:
            video = getattr(thread, "video", None)
            block = branch = None
            layout: TokenLayout | Reason = Reason(Outcome.FAILED)
            with self.engine.guarded():
                block = call_block(call.transformer_options, video)
                branch = call_branch(call.transformer_options)
                layout = self._layout(call, video)
            if isinstance(layout, Reason):
                self.engine.decline(layout)
                return call.dense(self.previous)
            if video is None:
                self.engine.remark(NO_GRID)
            out = self.engine.attention_of(
                call.tensors_by_head,
                layout=layout,
                dense=lambda: call.dense_by_head(self.previous),
                block=block,
                branch=branch,
                scale=call.options.get("scale"),
            )
            call.let_go()
            return call.as_asked(out)
        finally:
            thread.inside = False

    def _layout(self, call: AttentionCall, video) -> TokenLayout | Reason:
        """Where the call's tokens stand, or why it is left to dense attention."""
        mask, (batch, queries, keys) = call.options["mask"], call.sizes
        layout = call_layout(call.transformer_options, video, queries, keys)
        if isinstance(layout, Reason):
            return layout
        if _recording():
            return Reason(Outcome.CAPTURED)
        return layout if mask is None else self._masked(mask, layout, batch)

    def _masked(self, mask, layout: TokenLayout, batch: int) -> TokenLayout | Reason:
        """The layout under a mask, or why there is none. Read once an evaluation: that waits."""
        thread, place = self.thread, (layout.grid, layout.front, layout.back, batch)
        known = getattr(thread, "mask", None)
        if known is None or known[0]() is not mask or known[1] != place:
            with self.engine.scope():  # what is made here outlives the block that calls; its mask may not
                valid = valid_keys(mask, batch, layout.length)
                found = valid if isinstance(valid, Reason) else dataclasses.replace(layout, key_valid=valid)
                if isinstance(valid, torch.Tensor):
                    found = without_padding(layout, valid) or found
            known = thread.mask = weakref.ref(mask), place, found
        return known[2]


def _recording() -> bool:
    """Whether a CUDA graph is recorded: nothing may be read, and later steps repeat what is done now."""
    return torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing()
