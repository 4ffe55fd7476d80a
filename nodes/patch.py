"""Hooks one engine into a clone of a model: the attention override and its lifecycle.

The override sits in `transformer_options["optimized_attention_override"]`. Other nodes may take
that slot after us, so each model evaluation puts ours back on top, with whatever is there as the
dense fallback; evaluations get a fresh copy of the options, so nothing piles up.
"""

import contextlib
import functools
import logging
import threading

import comfy.model_management
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..fgattn.runs.engine import Engine
from ..fgattn.settings import Policy, Settings
from ..fgattn.show.snapshot import State
from ..fgattn.show.text import headline
from .live import Live
from .models import video_of
from .override import Override
from .sliders import SLIDERS
from .status import show

KEY = "fgattn"
SLOT = "optimized_attention_override"
CORE_SPARSE = "block_sparse_attention"  # key of ComfyUI's node Model Sparse Attention
BOTH_SPARSE = (
    "Model Sparse Attention is on this model too: it gets the calls that FG-Attn leaves dense, "
    "and with MiniMax-H3 all of them"
)
FULL_NOISE_PERCENT = 0.02  # a run that starts within this part of the schedule starts at full noise
NO_RUN = "no run yet"
NO_REPORT = "the last run has no report, see the log"
SECOND = (
    "not in force: this is the second model of a guider, which samples it in the run of its first one; "
    "only the first model's FG-Attn node counts"
)
log = logging.getLogger("fgattn")


class Patch:
    """One FG-Attn node's hold on a model; its clones and copies share it.

    Args:
        live_sliders: the page may change threshold and warm-up of a run that is going on.

    Attributes:
        without_run: why there is no report, where there is none.
    """

    def __init__(
        self, settings: Settings, policy: Policy, node_id: str | None = None, live_sliders: bool = False
    ):
        self.node_id, self.live_sliders = node_id, live_sliders
        self.engine = Engine(
            settings,
            policy,
            scope=_allocation_scope(),
            passthrough=(comfy.model_management.InterruptProcessingException,),
            notify=functools.partial(show, node_id),
        )
        self.live = Live(node_id, self.engine.so_far)
        self.thread = threading.local()  # of this thread's evaluation, see Override; sampling may use several
        self.without_run = NO_RUN
        self._sampling = 0  # runs that are going on, also those in which the engine could not start
        self._sigma: torch.Tensor | None = None  # of the evaluation that is going on
        self._level: float | None = None  # what that tensor holds
        self._is_told = False  # when an evaluation begins

    def __deepcopy__(self, memo) -> "Patch":
        return self

    def install(self, model):
        """A clone of the model with this patch; one that is already there is replaced."""
        model = model.clone()
        wrappers = (
            (WrappersMP.OUTER_SAMPLE, self.outer_sample),
            (WrappersMP.PREDICT_NOISE, self.predict_noise),
            (WrappersMP.APPLY_MODEL, self.apply_model),
        )
        for kind, wrapper in wrappers:
            model.remove_wrappers_with_key(kind, KEY)
            model.add_wrapper_with_key(kind, KEY, wrapper)
        for kind, callback in (
            (CallbacksMP.ON_DETACH, self.unloaded),
            (CallbacksMP.ON_PRE_RUN, self.prepared),
        ):
            model.remove_callbacks_with_key(kind, KEY)
            model.add_callback_with_key(kind, KEY, callback)
        options = model.model_options["transformer_options"]
        previous = options.get(SLOT)
        while isinstance(previous, Override):
            previous = previous.previous
        model.model_options["transformer_options"] = {**options, SLOT: self._override(previous)}
        return model

    def _override(self, previous) -> Override:
        return Override(self.engine, self.thread, previous, self.used_outside)

    def outer_sample(self, executor, *args, **kwargs):
        """Around one sampling run: args[3] is its schedule."""
        self._sampling += 1
        self.without_run = NO_RUN
        try:
            patcher = executor.class_obj.model_patcher
            sigmas = args[3].tolist()
            first = patcher.get_model_object("model_sampling").percent_to_sigma(FULL_NOISE_PERCENT)
            self.engine.begin_run(sigmas, bool(sigmas) and sigmas[0] >= float(first), patcher.load_device)
            if patcher.get_callbacks(CallbacksMP.ON_PREPARE_STATE, CORE_SPARSE):
                self.engine.remark(BOTH_SPARSE)
        except Exception:
            self._lost("could not start")
        self.live.begin()
        state: State = "done"
        try:
            with SLIDERS.during(self.node_id if self.live_sliders else None, self.engine):
                return executor(*args, **kwargs)
        except BaseException as error:
            stopped = isinstance(error, comfy.model_management.InterruptProcessingException)
            state = "interrupted" if stopped else "failed"
            raise
        finally:
            self._sampling -= 1
            self._sigma, self._level, self._is_told = None, None, False
            try:
                if report := self.engine.end_run():
                    self.live.end(report, state)
                    show(self.node_id, headline(report))
            except Exception:
                self._lost("could not read its statistics")

    def predict_noise(self, executor, x, timestep, *args, **kwargs):
        """Around one evaluation that a sampler asks for, in one call of the model or several."""
        with self.engine.guarded():
            self._is_told = True
            self._evaluation(timestep)
        return executor(x, timestep, *args, **kwargs)

    def _evaluation(self, sigma: torch.Tensor) -> None:
        """Finds the step, unless this evaluation goes on: wrappers around the model may copy the tensor."""
        if sigma is not self._sigma:
            self._sigma, before, self._level = sigma, self._level, float(sigma.max())
            if self._is_told or self._level != before:
                self.engine.begin_evaluation(self._level)
                self.live.update()

    def apply_model(self, executor, *args, **kwargs):
        """Around one call of the model (apply_model's arguments): takes the slot."""
        self.thread.video = self.thread.mask = None
        with self.engine.guarded():
            options = kwargs.get("transformer_options") or args[5]
            current = options.get(SLOT)
            if not (isinstance(current, Override) and current.engine is self.engine):
                options[SLOT] = self._override(current)
            sigma = options.get("sigmas")
            if sigma is not None and not self._is_told:  # by guiders that leave out the wrapper above
                self._evaluation(sigma)
            shape = (kwargs.get("latent_shapes") or [args[0].shape])[0]  # video first, before audio
            guides = kwargs.get("keyframe_idxs")  # [B, 3, tokens, ...] of LTX models
            self.thread.video = video_of(
                executor.class_obj.diffusion_model, shape, 0 if guides is None else guides.shape[2]
            )
        try:
            return executor(*args, **kwargs)
        finally:
            self.thread.mask = None

    def prepared(self, patcher) -> None:
        """ComfyUI is about to sample the model: in a run of ours that has begun, or in another's."""
        if not self._sampling:
            self.without_run = NO_RUN  # so that it is said once in each of them
            self.used_outside()

    def used_outside(self) -> None:
        """The model is sampled or called in a run that may be none of ours: then the node says so, once."""
        if self._sampling or self.without_run == SECOND:
            return
        self.without_run = SECOND
        self.engine.last_report = self.engine.last_maps = None  # of an earlier run
        show(self.node_id, SECOND)

    def unloaded(self, patcher, unpatch_all: bool) -> None:
        """ComfyUI takes the model off its device."""
        self.engine.release()

    def _lost(self, what: str) -> None:
        log.exception("FG-Attn %s; this run is dense or unreported", what)
        self.without_run = NO_REPORT
        show(self.node_id, f"FG-Attn {what}, see the log")


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
