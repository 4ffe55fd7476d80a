"""Prepared launches: what Triton works out for a launch is kept, and serves later launches that are like it.

Triton examines every argument of every launch for the variant of the kernel that fits, which takes the host
longer than to queue it. `launch_kernel` only compares: scalars by type and value, tuples of whole numbers by
value, tensors by type of element, tensor maps by kind. Launches that agree in these, in their options and in
the device run one variant, if all pointers are divisible by 16. All others, and the first of each kind, go
the ordinary way. `_prepare` tries whether Triton's launcher works as is assumed here; where it does not, all
launches go the ordinary way.

Triton compiles a kernel when it is first launched, one after the other. `compiling` makes the kernels of many
launches ready side by side, before the first of them runs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver

LIMIT = 1024  # kinds of launches that are kept; when there are more, all are forgotten
COMPILERS = 8  # kernels that are compiled at a time
SCALARS = (int, float, bool, type(None))
# Of every launch. Triton 3.10 no longer fuses multiply-adds by default: kernels would be slower, bits differ.
ALWAYS = {"enable_fp_fusion": True}
_knobs: Any = getattr(getattr(triton, "knobs", None), "runtime", None)  # None: an older Triton


class _Prepared(NamedTuple):
    queue: Any  # the compiled function that queues launches of a kernel with this signature
    head: tuple  # its arguments between the stream and the kernel's own
    constants: tuple  # constexprs, which come after all other arguments
    kernel: Any  # held, since keys have its id


_is_compiling: ContextVar[bool] = ContextVar("is_compiling", default=False)
kept: dict[tuple, _Prepared | None] = {}  # None: not to be prepared


def launch_kernel(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """`kernel[grid](*args, **options)`, where args are all arguments of the kernel but its constexprs."""
    if _is_compiling.get():
        kernel.warmup(*args, grid=grid, **options, **ALWAYS)
        return
    known = _key(kernel, args, options)
    if known is None:
        kernel[grid](*args, **options, **ALWAYS)
        return
    key, values, device = known
    prepared = kept.get(key)
    if prepared is not None:
        x, y, z = (*grid, 1, 1)[:3]
        prepared.queue(
            x, y, z, driver.active.get_current_stream(device), *prepared.head, *values, *prepared.constants
        )
        return
    compiled = kernel[grid](*args, **options, **ALWAYS)
    if key not in kept:
        if len(kept) >= LIMIT:
            kept.clear()
        kept[key] = _prepare(kernel, compiled, args, options)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Within it, launches of this thread make their kernels ready instead of running; at its end all are.

    What launches would write is left as it is. A kernel that fails here fails again when it is launched, and
    the reason shows there. A Triton that cannot compile side by side runs the launches.
    """
    if not hasattr(triton, "AsyncCompileMode"):
        yield
        return
    workers = ThreadPoolExecutor(min(COMPILERS, os.cpu_count() or 1))
    with workers, triton.AsyncCompileMode(_Compilers(workers), ignore_errors=True):
        before = _is_compiling.set(True)
        try:
            yield
        finally:
            _is_compiling.reset(before)


class _Compilers:
    """Where Triton sends what it compiles: the launcher is made and the kernel loaded there, too."""

    def __init__(self, workers: Executor):
        self._workers = workers

    def submit(self, compile_kernel: Callable) -> Future:
        device = driver.active.get_current_device()

        def make_ready():
            driver.active.set_current_device(device)  # of the worker's thread
            compiled = compile_kernel()
            with contextlib.suppress(Exception):  # fails again at the launch
                getattr(compiled, "run", None)  # is made when it is asked for
            return compiled

        return self._workers.submit(make_ready)


def _key(kernel, args: tuple, options: dict) -> tuple[tuple, list, int] | None:
    """What tells launches apart, args with pointers as numbers, and the device; None: launch ordinarily."""
    if _knobs is None or not isinstance(kernel, triton.JITFunction) or kernel.pre_run_hooks or _is_hooked():
        return None
    types = (*map(type, args),)
    if (places := _places(types)) is None:
        return None
    device, pointers = driver.active.get_current_device(), 0
    kinds, values = [*args], [*args]
    for i in places[0]:
        x = args[i]
        if x.get_device() != device:
            return None
        kinds[i], values[i] = x.dtype, x.data_ptr()
        pointers |= values[i]
    for i in places[1]:
        kinds[i] = getattr(args[i], "kind", None)
        if kinds[i] is None:
            return None
    for i in places[2]:
        for number in args[i]:
            if type(number) is not int:
                return None
    if pointers % 16:
        return None
    given = (*options.values(),)
    key = id(kernel), device, _knobs.debug, types, *kinds, *options, *given, *map(type, given)
    return key, values, device


def _is_hooked() -> bool:
    """Whether somebody, such as a profiler, has asked Triton to be told of launches."""
    enter, leave = _knobs.launch_enter_hook, _knobs.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
    )


@functools.lru_cache(maxsize=LIMIT)
def _places(types: tuple[type, ...]) -> tuple[tuple[int, ...], ...] | None:
    """Places of tensors, tensor maps and tuples among arguments of these types; None if there are others."""
    tensors = tuple(i for i, t in enumerate(types) if t is torch.Tensor)
    maps = tuple(i for i, t in enumerate(types) if t.__name__ == "TensorDescriptor")
    tuples = tuple(i for i, t in enumerate(types) if t is tuple)
    others = len(types) - len(tensors) - len(maps) - len(tuples)
    return (tensors, maps, tuples) if sum(t in SCALARS for t in types) == others else None


def _prepare(kernel, compiled, args: tuple, options: dict) -> _Prepared | None:
    """What launches like this one, which was made, shall pass on; None if Triton passes on something else."""
    passed: list[tuple] = []
    try:
        constants = tuple(options[name] for name in kernel.arg_names[len(args) :])
        run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
        none = (None, None, None)  # metadata of the launch, hooks
        head = function, run.launch_cooperative_grid, run.launch_pdl, None, None, packed, *none  # no scratch
        trial = copy.copy(run)
        trial.launch = lambda *given: passed.append(given)
        trial(1, 2, 3, 4, function, packed, *none, *args, *constants)
        is_alike = passed == [(1, 2, 3, 4, *head, *args, *constants)]
    except Exception:  # another Triton, or an argument without a value here
        is_alike = False
    return _Prepared(run.launch, head, constants, kernel) if is_alike else None


def template(described):
    """A tensor map, such as of an empty tensor, that others can be made `like`."""
    described.kind = described.base.dtype, tuple(described.block_shape), repr(described.layout)
    return described


def like(described, x: torch.Tensor):
    """The tensor map of x with the shape, strides and boxes of a template, which were checked there."""
    if x.dtype != described.base.dtype or x.data_ptr() % 16:
        raise ValueError("a tensor map is made like one of the same type, and of aligned tensors")
    made = object.__new__(type(described))
    made.__dict__.update(described.__dict__)
    made.base = x
    return made
