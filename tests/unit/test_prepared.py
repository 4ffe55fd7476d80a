"""Prepared launches: the same variant with the same arguments as Triton would take, or Triton itself."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: nothing to launch")
prepared = pytest.importorskip("fgattn.backends.shared.prepared")
if not hasattr(getattr(triton, "knobs", None), "runtime"):
    pytest.skip("this Triton has no knobs: every launch is ordinary", allow_module_level=True)

NAMES = ("x", "y", "n", "scale", "BLOCK", "HAS_Y")


class Launcher:
    """As Triton's own: hands on to a compiled function what it was called with."""

    launch_cooperative_grid, launch_pdl, scratch = False, False, None

    def __init__(self, queued):
        self.launch = lambda *args: queued.append(args)

    def __call__(self, x, y, z, stream, function, *args):
        self.launch(
            x,
            y,
            z,
            stream,
            function,
            self.launch_cooperative_grid,
            self.launch_pdl,
            self.scratch,
            None,
            *args,
        )


class Compiled:
    function, packed_metadata = 11, (4, 1, 0)

    def __init__(self, queued):
        self.run = Launcher(queued)


class Kernel(triton.JITFunction):
    """Notes what is launched through Triton, and what is queued past it."""

    def __init__(self, compiled=Compiled):
        self.arg_names, self.pre_run_hooks = NAMES, []
        self.ordinary, self.queued, self.ready = [], [], []
        self._compiled = compiled

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.ordinary.append((grid, args, options))
            return self._compiled(self.queued)

        return launch

    def warmup(self, *args, grid, **options):
        self.ready.append((grid, args, options))

    def launch(self, *args, grid=(5,), **options):
        """Whether Triton was left out."""
        before = len(self.ordinary)
        prepared.launch_kernel(self, grid, *args, **{"BLOCK": 64, "HAS_Y": True, "num_warps": 4, **options})
        return len(self.ordinary) == before


@pytest.fixture(autouse=True)
def imitated(monkeypatch):
    """A device whose tensors say they are on number -1, as those of a CPU do."""

    class Driver:
        device = -1

        def get_current_device(self):
            return self.device

        def set_current_device(self, device):
            self.set_to = device

        def get_current_stream(self, device):
            return 100 + device

    monkeypatch.setattr(prepared.driver, "_active", Driver())
    monkeypatch.setattr(prepared, "kept", {})
    return prepared.driver.active


def aligned(n: int = 8, dtype=torch.float32) -> torch.Tensor:
    storage = torch.zeros(n + 64, dtype=dtype)
    first = -storage.data_ptr() % 16 // storage.element_size()
    return storage[first : first + n]


X, Y = aligned(), aligned()


def test_what_is_queued_is_what_triton_would_queue():
    kernel = Kernel()
    assert not kernel.launch(X, Y, 7, 0.5) and not kernel.queued
    other = aligned(12)
    assert kernel.launch(other, Y, 7, 0.5, grid=(2, 3))
    head = (11, False, False, None, None, (4, 1, 0), None, None, None)
    assert kernel.queued == [(2, 3, 1, 99, *head, other.data_ptr(), Y.data_ptr(), 7, 0.5, 64, True)]


@pytest.mark.parametrize(
    "args, options",
    [
        ((X, Y, 32, 0.5), {}),
        ((X, Y, 1, 0.5), {}),
        ((X, Y, 1 << 40, 0.5), {}),
        ((X, Y, 17, 0.5), {}),
        ((X, Y, 16.0, 0.5), {}),
        ((X, Y, True, 0.5), {}),
        ((X, None, 16, 0.5), {}),
        ((X, Y, 16, 1), {}),
        ((aligned(8, torch.float16), Y, 16, 0.5), {}),
        ((X, Y, 16, 0.5), {"BLOCK": 128}),
        ((X, Y, 16, 0.5), {"num_warps": 8}),
        ((X, Y, 16, 0.5), {"HAS_Y": 1}),
        ((X, Y, 16, 0.5), {"maxnreg": 128}),
    ],
    ids=str,
)
def test_another_kind_of_launch_is_looked_at_by_triton(args, options):
    """Whatever may change the variant: values that Triton specialises, types, constexprs, options."""
    kernel = Kernel()
    assert not kernel.launch(X, Y, 16, 0.5) and kernel.launch(X, Y, 16, 0.5)
    assert not kernel.launch(*args, **options) and kernel.launch(*args, **options)
    assert kernel.launch(X, Y, 16, 0.5) and len(kernel.ordinary) == 2


def test_pointers_that_are_not_aligned_are_never_prepared():
    kernel = Kernel()
    assert not kernel.launch(X, Y, 16, 0.5)
    assert not any(kernel.launch(X[1:], Y, 16, 0.5) or kernel.launch(X, Y[1:], 16, 0.5) for _ in range(3))


def test_devices_and_kernels_are_kept_apart(imitated):
    one, two = Kernel(), Kernel()
    assert not one.launch(X, Y, 16, 0.5) and not two.launch(X, Y, 16, 0.5) and one.launch(X, Y, 16, 0.5)
    imitated.device = 0
    assert not any(one.launch(X, Y, 16, 0.5) for _ in range(3)), "the tensors are on another device"


def test_whoever_asked_to_be_told_of_launches_is_told(monkeypatch):
    kernel = Kernel()
    assert not kernel.launch(X, Y, 16, 0.5) and kernel.launch(X, Y, 16, 0.5)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patch:
            patch.setattr(triton.knobs.runtime, name, lambda metadata: None, raising=False)
            assert not kernel.launch(X, Y, 16, 0.5)
    kernel.pre_run_hooks.append(lambda *args, **options: None)
    assert not kernel.launch(X, Y, 16, 0.5)


def test_a_triton_that_launches_otherwise_is_left_to_it():
    class More(Launcher):
        def __call__(self, *args):
            super().__call__(*args, "one more")

    class Scratch(Launcher):
        scratch = object()

    for launcher in (More, Scratch, lambda queued: None):

        class Other(Compiled):
            def __init__(self, queued, launcher=launcher):
                self.run = launcher(queued)

        kernel = Kernel(Other)
        assert not any(kernel.launch(X, Y, 16, 0.5) for _ in range(3)) and not kernel.queued
    kernel = Kernel(lambda queued: None)
    assert not any(kernel.launch(X, Y, 16, 0.5) for _ in range(3))


def test_constexprs_by_default_and_arguments_of_other_types_are_left_to_triton():
    kernel = Kernel()
    for _ in range(3):
        prepared.launch_kernel(kernel, (5,), X, Y, 16, 0.5, BLOCK=64)
        prepared.launch_kernel(kernel, (5,), X, (Y, Y), 16, 0.5, BLOCK=64, HAS_Y=True)
    assert len(kernel.ordinary) == 6 and not kernel.queued


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(prepared, "LIMIT", 3)
    kernel = Kernel()
    for n in range(10):
        assert not kernel.launch(X, Y, n, 0.5) and kernel.launch(X, Y, n, 0.5)
        assert len(prepared.kept) <= 3


def test_interpreted_kernels_are_called_as_ever():
    called = []
    kernel = {(5,): lambda *args, **options: called.append((args, options))}
    for _ in range(2):
        prepared.launch_kernel(kernel, (5,), 1, BLOCK=2)
    assert called == [((1,), {"BLOCK": 2, **prepared.ALWAYS})] * 2


class TensorDescriptor:
    """As Triton's, but for its checks."""

    def __init__(self, base, shape, block_shape, layout):
        self.base, self.shape, self.block_shape, self.layout = base, shape, block_shape, layout


def test_tensor_maps_are_told_apart_by_kind():
    def map_of(x, block=(4,), layout="swizzled", shape=(8,)):
        empty = torch.empty(0, dtype=x.dtype)
        return prepared.like(prepared.template(TensorDescriptor(empty, shape, list(block), layout)), x)

    kernel = Kernel()
    one = map_of(X)
    assert (one.base, one.shape, one.block_shape) == (X, (8,), [4])
    assert not kernel.launch(one, Y, 16, 0.5)
    assert kernel.launch(map_of(Y, shape=(6,)), Y, 16, 0.5), "shapes go along with each launch"
    for other in (map_of(X, block=(8,)), map_of(X, layout="flat"), map_of(aligned(8, torch.float16))):
        assert not kernel.launch(other, Y, 16, 0.5) and kernel.launch(other, Y, 16, 0.5)
    assert not any(kernel.launch(TensorDescriptor(X, (8,), [4], "swizzled"), Y, 16, 0.5) for _ in range(2))


def test_tensor_maps_are_made_of_what_their_template_was_checked_for():
    one = prepared.template(TensorDescriptor(torch.empty(0), (8,), [4], "swizzled"))
    for wrong in (X[1:], aligned(8, torch.float16)):
        with pytest.raises(ValueError):
            prepared.like(one, wrong)


needs_side_by_side = pytest.mark.skipif(
    not hasattr(triton, "AsyncCompileMode"), reason="this Triton does not compile side by side"
)


@needs_side_by_side
def test_compiling_runs_nothing():
    """Even what is prepared is only made ready; launches that follow, and those of other threads, do run."""
    kernel, other = Kernel(), Kernel()
    kernel.launch(X, Y, 7, 0.5)
    with prepared.compiling():
        kernel.launch(X, Y, 7, 0.5)
        kernel.launch(X, Y, 32, 0.5, grid=(2, 3))
        thread = threading.Thread(target=lambda: other.launch(X, Y, 7, 0.5))
        thread.start()
        thread.join()
    assert len(kernel.ordinary) == 1 and not kernel.queued
    assert len(other.ordinary) == 1 and not other.ready
    options = {"BLOCK": 64, "HAS_Y": True, "num_warps": 4, **prepared.ALWAYS}
    assert kernel.ready == [((5,), (X, Y, 7, 0.5), options), ((2, 3), (X, Y, 32, 0.5), options)]
    assert kernel.launch(X, Y, 7, 0.5) and not kernel.launch(X, Y, 32, 0.5)


@needs_side_by_side
def test_an_error_ends_the_compiling():
    """Launches run again."""
    kernel = Kernel()
    with pytest.raises(ZeroDivisionError), prepared.compiling():
        raise ZeroDivisionError
    assert not kernel.launch(X, Y, 7, 0.5) and len(kernel.ordinary) == 1


def test_a_triton_that_compiles_one_after_the_other_runs_the_launches(monkeypatch):
    monkeypatch.delattr(triton, "AsyncCompileMode", raising=False)
    kernel = Kernel()
    with prepared.compiling():
        kernel.launch(X, Y, 7, 0.5)
    assert len(kernel.ordinary) == 1 and not kernel.ready


@pytest.mark.parametrize("fails", [False, True])
def test_launchers_are_made_beside_the_kernels(fails, imitated):
    """In the worker's thread, on the device of the launch; what fails there shows when it is launched."""
    seen = []

    class Made:
        @property
        def run(self):
            seen.append((threading.current_thread(), imitated.set_to))
            if fails:
                raise RuntimeError("no C compiler")

    made = Made()
    with ThreadPoolExecutor() as workers:
        assert prepared._Compilers(workers).submit(lambda: made).result() is made
    ((thread, device),) = seen
    assert thread is not threading.current_thread() and device == -1
