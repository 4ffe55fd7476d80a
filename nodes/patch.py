"""Hooks one engine into a clone of a model: the attention override and its lifecycle.

The override sits in `transformer_options["optimized_attention_override"]`. Other nodes may take
that slot after us, so each model evaluation puts ours back on top, with whatever is there as the
dense fallback; evaluations get a fresh copy of the options, so nothing piles up.
"""

import contextlib
import dataclasses
import functools
import logging
import threading

import comfy.model_management
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from einops import rearrange

from ..fgattn.outcomes import Reason
from ..fgattn.runs.engine import Engine
from ..fgattn.settings import Policy, Settings
from ..fgattn.show.text import headline
from .live import Live
from .models import NO_GRID, call_block, call_branch, call_layout, valid_keys, video_of, without_padding
from .sliders import SLIDERS
from .status import show

KEY = "fgattn"
SLOT = "optimized_attention_override"
CORE_SPARSE = "block_sparse_attention"  # key of ComfyUI's node Model Sparse Attention
BOTH_SPARSE = ("Model Sparse Attention is on this model too: it gets the calls that FG-Attn leaves dense, "
               "and with MiniMax-H3 all of them")
FULL_NOISE_PERCENT = 0.02  # a run that starts within this part of the schedule starts at full noise
log = logging.getLogger("fgattn")


class Patch:
    """One FG-Attn node's hold on a model; its clones share it.

    Args:
        live_sliders: the page may change threshold and warm-up of a run that is going on.
    """

    def __init__(
        self, settings: Settings, policy: Policy, node_id: str | None = None, live_sliders: bool = False,
    ):
        self.node_id, self.live_sliders = node_id, live_sliders
        self.engine = Engine(
            settings, policy, scope=_allocation_scope(),
            passthrough=(comfy.model_management.InterruptProcessingException,),
            notify=functools.partial(show, node_id))
        self.live = Live(node_id, self.engine.so_far)
        self.thread = threading.local()  # of this thread's evaluation, see Override; sampling may use several
        self._sigma = None  # the tensor that was read last

    def install(self, model):
        """A clone of the model with this patch; one that is already there is replaced."""
        model = model.clone()
        for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.APPLY_MODEL):
            model.remove_wrappers_with_key(kind, KEY)
        model.remove_callbacks_with_key(CallbacksMP.ON_DETACH, KEY)
        model.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, self.unloaded)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self.outer_sample)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self.apply_model)
        options = model.model_options["transformer_options"]
        previous = options.get(SLOT)
        while isinstance(previous, Override):
            previous = previous.previous
        model.model_options["transformer_options"] = {**options, SLOT: Override(self, previous)}
        return model

    def outer_sample(self, executor, *args, **kwargs):
        """Around one sampling run: args[3] is its schedule."""
        patcher = executor.class_obj.model_patcher
        try:
            sigmas = args[3].tolist()
            first = patcher.get_model_object("model_sampling").percent_to_sigma(FULL_NOISE_PERCENT)
            self.engine.begin_run(sigmas, bool(sigmas) and sigmas[0] >= float(first), patcher.load_device)
            if patcher.get_callbacks(CallbacksMP.ON_PREPARE_STATE, CORE_SPARSE):
                self.engine.remark(BOTH_SPARSE)
        except Exception:
            self._lost("could not start")
        self.live.begin()
        state = "done"
        try:
            with SLIDERS.during(self.node_id if self.live_sliders else None, self.engine):
                return executor(*args, **kwargs)
        except BaseException as error:
            stopped = isinstance(error, comfy.model_management.InterruptProcessingException)
            state = "interrupted" if stopped else "failed"
            raise
        finally:
            self._sigma = None
            try:
                if report := self.engine.end_run():
                    show(self.node_id, headline(report))
                    self.live.end(report, state)
            except Exception:
                self._lost("could not read its statistics")

    def apply_model(self, executor, *args, **kwargs):
        """Around one model evaluation (apply_model's arguments): finds the step, takes the slot."""
        options = kwargs.get("transformer_options") or args[5]
        sigma = options.get("sigmas")
        if sigma is not None and sigma is not self._sigma:
            self._sigma = sigma
            self.engine.begin_evaluation(float(sigma.max()))
            self.live.update()
        current = options.get(SLOT)
        if not (isinstance(current, Override) and current.patch is self):
            options[SLOT] = Override(self, current)
        shape = (kwargs.get("latent_shapes") or [args[0].shape])[0]  # video first, where there is audio too
        self.thread.video = video_of(executor.class_obj.diffusion_model, shape)
        self.thread.mask = None
        try:
            return executor(*args, **kwargs)
        finally:
            self.thread.mask = None

    def unloaded(self, patcher, unpatch_all: bool) -> None:
        """ComfyUI takes the model off its device."""
        self.engine.release()

    def _lost(self, what: str) -> None:
        log.exception("FG-Attn %s; this run is dense or unreported", what)
        show(self.node_id, f"FG-Attn {what}, see the log")


class Override:
    """The attention override of one patch, chained to the one it found."""

    def __init__(self, patch: Patch, previous):
        self.patch, self.previous = patch, previous

    @torch.compiler.disable
    def __call__(
        self, func, q, k, v, heads, mask=None, attn_precision=None,
        skip_reshape=False, skip_output_reshape=False, **kwargs,
    ):
        """ComfyUI's contract: q, k, v [B, L, H*D], or [B, H, L, D] with skip_reshape."""
        options = kwargs.get("transformer_options") or {}

        def fallback():
            call = functools.partial(self.previous, func) if self.previous else func
            return call(q, k, v, heads, mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
                        skip_output_reshape=skip_output_reshape, **kwargs)

        thread = self.patch.thread
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
                self.patch.engine.decline(layout)
                return fallback()
            if video is None:
                self.patch.engine.remark(NO_GRID)
            split = functools.partial(rearrange, pattern="b l (h d) -> b h l d", h=heads)
            out = self.patch.engine.attention(
                *((q, k, v) if skip_reshape else map(split, (q, k, v))), layout=layout,
                dense=(fallback if skip_output_reshape else lambda: split(fallback())),
                block=call_block(options, video), branch=call_branch(options),
                scale=kwargs.get("scale"))
            return out if skip_output_reshape else rearrange(out, "b h l d -> b l (h d)")
        finally:
            thread.inside = False

    def _masked(self, mask, layout, batch):
        """The layout under a mask, or why there is none. Read once an evaluation: that waits."""
        thread, place = self.patch.thread, (layout.grid, layout.front, layout.back, batch)
        known = getattr(thread, "mask", None)
        if known is None or known[0] is not mask or known[1] != place:
            valid = valid_keys(mask, batch, layout.length)
            found = valid if isinstance(valid, Reason) else dataclasses.replace(layout, key_valid=valid)
            if isinstance(valid, torch.Tensor):
                found = without_padding(layout, valid) or found
            known = thread.mask = mask, place, found
        return known[2]


def patch_of(model) -> Patch | None:
    """The FG-Attn patch of a model, if it has one."""
    wrappers = model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)
    return wrappers[0].__self__ if wrappers else None


def _allocation_scope():
    """ComfyUI's pause of its allocation recording, where the release has it."""
    try:
        from comfy.model_prefetch import pause_malloc_graph
    except ImportError:
        return contextlib.nullcontext
    return pause_malloc_graph
