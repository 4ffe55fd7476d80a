"""Runtime: the library without Triton, and reasons why the kernel does not run."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fgattn import Settings, TokenLayout, Unsupported, attend, build_plan
from fgattn import __main__ as doctor
from fgattn.backends import runtime
from fgattn.runs import engine
from fgattn.runs.clock import Clock
from fgattn.runs.engine import Engine
from fgattn.settings import Policy
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).parents[2]

WITHOUT_TRITON = """
import importlib.util, json, sys

class Fence:  # no ComfyUI either
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("comfy", "comfy_api", "folder_paths", "server", "nodes"):
            raise AssertionError(name + " was imported")

sys.meta_path.insert(0, Fence())
sys.modules["triton"] = None
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "fgattn", folder + "/__init__.py", submodule_search_locations=[folder])
fgattn = sys.modules["fgattn"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fgattn)
import torch
from fgattn.runs import engine, stats
from fgattn.show import text as report
from fgattn.backends import runtime

q, k, v = torch.randn(3, 1, 2, 256, 64).unbind()
layout, settings = fgattn.TokenLayout((4, 8, 8)), fgattn.Settings()
plan = fgattn.build_plan(q, k, settings, layout)
out = fgattn.attend(q, k, v, plan)
try:
    fgattn.attend(q, k, v, plan, impl="triton")
except fgattn.Unsupported as error:
    message = str(error)
one = engine.Engine(settings, engine.Policy(0))
one.begin_run([1.0, 0.0], True, torch.device("cpu"))
one.attention(q, k, v, layout=layout, dense=lambda: 1 / 0)
print(json.dumps({
    "equal": torch.equal(out, fgattn.attend(q, k, v, plan, impl="torch")), "message": message,
    "missing": runtime.missing(), "calls": {reason.text: n for reason, n in one.end_run().calls.items()},
    "kernels": [name for name in sys.modules if "shared" in name and name.startswith("fgattn")]}))
"""


def test_library_works_without_triton_and_comfyui():
    """Windows and macOS: everything but the kernel, and the reason for that one."""
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON, str(ROOT / "fgattn")], capture_output=True,
                         text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["equal"] and found["calls"] == {"sparse": 1} and found["kernels"] == []
    assert found["missing"] == "Triton is not installed"
    assert found["message"].startswith("impl: got 'triton'; allowed: torch or reference here. ")
    assert found["message"].endswith("The triton kernel cannot run: Triton is not installed.")


@pytest.mark.skipif(runtime.missing() is not None, reason="Triton is not installed: it has no limits")
@pytest.mark.parametrize(("dim", "dtype", "reason"), [
    (40, torch.float32, "head size 40 (the kernel has 64, 128)"),
    (64, torch.float64, "float64"),
    (64, torch.bfloat16, "no Triton kernel for device type cpu"),
], ids=["head size", "float64", "device"])
def test_reason_why_the_kernel_cannot_run(dim, dtype, reason):
    """Shown to users; the node counts calls under it."""
    q = torch.zeros(1, 1, 16, dim, dtype=dtype)
    assert runtime.unavailable(q) == reason and runtime.triton_reason(q) == reason


def test_device_reason_of_the_cpu():
    """The interpreter is no way to run a model."""
    assert runtime.device_reason(torch.device("cpu")) == "Triton's interpreter is for tests"


def test_hopper_needs_a_hopper_gpu():
    """Asking for it elsewhere is refused with the reason; nothing is tried."""
    q, k, v = torch.zeros(3, 1, 1, 16, 64, dtype=torch.bfloat16).unbind()
    assert runtime.hopper_missing(q.device) == runtime.hopper_reason(q.device) == "no Hopper GPU: cpu"
    plan = build_plan(q, k, Settings(), TokenLayout.flat(16))
    with pytest.raises(Unsupported, match="The hopper kernel cannot run: "):
        attend(q, k, v, plan, impl="hopper")
    assert runtime.fastest(q) == "torch"


@pytest.mark.parametrize(("capability", "gluon", "says"), [
    ((9, 0), True, None),
    ((8, 9), True, "no Hopper GPU: compute capability 8.9, not 9.0"),
    ((9, 0), False, "this Triton lacks what the Hopper kernel needs: "),
], ids=["Hopper", "Ada", "Triton without Gluon"])
def test_why_there_is_no_hopper_kernel(capability, gluon, says, monkeypatch):
    """The GPU and the features of Triton decide, not version strings."""
    pytest.importorskip("triton.experimental.gluon")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if not gluon:
        monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
        monkeypatch.delitem(sys.modules, "fgattn.backends.hopper.attend", raising=False)
        monkeypatch.delattr(sys.modules["fgattn.backends.hopper"], "attend", raising=False)
    reason = runtime.hopper_missing(torch.device("cuda", 0))
    assert reason is None if says is None else reason.startswith(says)


@pytest.fixture
def fresh():
    """Verdicts are kept for a process: none from before, none left behind."""
    cached = (runtime.missing, runtime.device_reason, runtime.hopper_reason)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(("hopper", "portable", "dense", "runs", "tested"), [
    (None, None, None, "hopper", ["hopper"]),
    ("off by 2", None, None, "triton (no hopper: off by 2)", ["hopper", "triton"]),
    ("off by 2", "no image", "no image (no hopper: off by 2)", None, ["hopper", "triton"]),
], ids=["Hopper", "portable", "dense"])
def test_every_step_down_has_its_reason(hopper, portable, dense, runs, tested, fresh, monkeypatch, caplog):
    """Hopper, portable, dense: in the verdict of the engine, the doctor and the report, and in the log."""
    asked = []

    def wrong(device, impl, tile_keys):
        asked.append(impl)
        return {"hopper": hopper, "triton": portable}[impl]

    monkeypatch.setattr(runtime, "_wrong", wrong)
    monkeypatch.setattr(runtime, "hopper_missing", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with caplog.at_level(logging.INFO, "fgattn"):
        assert runtime.device_reason(GPU) == runtime.device_reason(GPU) == dense
    assert asked == tested, "each kernel is tried once, and only where the faster one failed"
    said = [f"FG-Attn leaves its hopper kernel: {hopper}"] if hopper else []
    if dense:
        said.append(f"FG-Attn leaves its triton kernel: {portable}")
    elif hopper:
        said.append(f"FG-Attn runs its portable Triton kernel: {hopper}")
    assert [r.getMessage() for r in caplog.records] == said
    if not dense:
        assert runtime.gpu_kernel(GPU) == runs
    monkeypatch.setattr(runtime, "missing", lambda: None)
    assert doctor._implementation(GPU) == (
        f"dense attention: {dense}" if dense else f"{runs}: the kernel's self-test passed")
    run = SimpleNamespace(device_reason=engine._device_reason(GPU), stats=SimpleNamespace(clock=Clock(GPU)))
    assert Engine(Settings(), Policy())._implementation(run) == (f"dense ({dense})" if dense else runs)


def test_a_gpu_without_hopper_says_so(fresh, monkeypatch, caplog):
    """An Ada card: nothing failed, so no warning; the log and the doctor still say what runs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(runtime, "_wrong", lambda device, impl, tile_keys: None)
    with caplog.at_level(logging.INFO, "fgattn"):
        assert runtime.device_reason(GPU) is None
    reason = "no Hopper GPU: compute capability 8.9, not 9.0"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", f"FG-Attn runs its portable Triton kernel: {reason}")]
    assert runtime.gpu_kernel(GPU) == f"triton (no hopper: {reason})"


def test_broken_triton_is_a_reason(fresh, monkeypatch):
    """Installed, but for another driver or torch: everything but the kernels still works."""
    pytest.importorskip("triton")
    monkeypatch.setitem(sys.modules, "fgattn.backends.triton.attend", None)
    monkeypatch.delattr(sys.modules["fgattn.backends.triton"], "attend", raising=False)
    assert runtime.missing().startswith("Triton is installed but does not load: ModuleNotFoundError: ")
    q, k, v = torch.randn(3, 1, 1, 64, 64).unbind()
    plan = build_plan(q, k, Settings(), TokenLayout.flat(64))
    assert torch.equal(attend(q, k, v, plan), attend(q, k, v, plan, impl="torch"))


@pytest.mark.parametrize(("module", "hit", "said"), [
    ("fgattn.backends.shared.select", False, ["FG-Attn is compiling kernels, once: select_kernel"]),
    ("fgattn.backends.shared.select", True, []),
    ("torch._inductor.runtime", False, []),
], ids=["new", "from the cache", "somebody else's"])
def test_compiling_is_announced(module, hit, said, caplog):
    """By Triton's own account: silent where its cache serves; whoever listened before still hears."""
    pytest.importorskip("triton")
    from fgattn.backends.shared.compile_log import announced

    heard = []
    source = SimpleNamespace(name="select_kernel", fn=SimpleNamespace(__module__=module))
    event = {"src": source, "cache_hit": hit, "times": None}
    with caplog.at_level(logging.INFO, "fgattn"):
        announced(None)(**event)
        assert [r.getMessage() for r in caplog.records] == said
        announced(lambda **event: heard.append(event))(**event)
    assert heard == [event]


def test_compiling_is_heard():
    """Triton calls the listener that the package left with it."""
    triton = pytest.importorskip("triton")
    kernels = pytest.importorskip("fgattn.backends.shared.compile_log")
    assert triton.knobs.compilation.listener.__qualname__ == "announced.<locals>.listener"
    assert triton.knobs.compilation.listener.__module__ == kernels.__name__


def no_kernel(*_):
    raise RuntimeError("no kernel image\n  for this device")


@pytest.mark.parametrize(("kernel", "says"), [
    (lambda q, k, v, plan: attend(q, k, v, plan, impl="torch"), None),
    (lambda q, k, v, plan: 1.02 * attend(q, k, v, plan, impl="torch"), "the kernels' self-test is off by 2."),
    (lambda q, k, v, plan: torch.full_like(q, float("nan")), "the kernels' self-test is off by nan"),
    (lambda q, k, v, plan: scaled_dot_product_attention(q, k, v), "the kernels' self-test is off by"),
    (no_kernel, "the kernels do not compile or run here: RuntimeError: no kernel image for this device"),
], ids=["right", "2 % off", "NaN", "ignores the mask", "fails"])
def test_self_test(kernel, says, monkeypatch, caplog):
    """A kernel that is wrong on this GPU must be found before it draws a picture, and said in the log."""
    monkeypatch.setattr("fgattn.plan.build_plan", lambda *given, impl: build_plan(*given, impl="torch"))
    monkeypatch.setattr("fgattn.attention.attend", lambda q, k, v, plan, impl: (
        kernel(q, k, v, plan) if impl == "triton" else attend(q, k, v, plan, impl=impl)))
    result = runtime.self_test(torch.device("cpu"), "triton")
    assert result is None if says is None else result.startswith(says)
    assert len(caplog.records) == (result is not None)
    assert [bool(r.exc_info) for r in caplog.records] == [kernel is no_kernel] * len(caplog.records)


def test_a_full_gpu_says_nothing_of_the_kernels(monkeypatch):
    """Another model may fill it while the self-test runs: that must not last for the process."""
    monkeypatch.setattr(runtime, "_wrong", lambda *_: (_ for _ in ()).throw(runtime.OutOfMemory("no room")))
    with pytest.raises(runtime.OutOfMemory):
        runtime.self_test(torch.device("cpu"), "triton")


@pytest.mark.parametrize(("fails", "boxed", "gathering"), [
    (set(), "hopper", "hopper"), ({True}, "hopper", "triton"), ({False, True}, "triton", "triton")])
def test_each_way_to_bring_keys_has_its_self_test(fails, boxed, gathering, monkeypatch):
    """A Triton that gathers wrongly must not cost the copy engine's way."""
    monkeypatch.setattr(runtime, "triton_reason", lambda q: None)
    monkeypatch.setattr(
        runtime, "hopper_reason", lambda device, gathers=False: "off" if gathers in fails else None)
    q = torch.empty(1, 1, 64, 128)
    assert (runtime.fastest(q), runtime.fastest(q, gathers=True)) == (boxed, gathering)


@pytest.mark.parametrize(("tile_keys", "grid", "masked", "gathers"), [
    (16, (4, 8, 8), False, False), (8, (4, 8, 8), False, False), (4, (4, 8, 8), False, True),
    (16, (4, 8, 8), True, True), (16, (3, 5, 7), False, True)])
def test_plans_that_gather(tile_keys, grid, masked, gathers):
    """Octets of keys that are boxes in memory are fetched whole, everything else row by row."""
    from fgattn import Settings, TokenLayout

    length = grid[0] * grid[1] * grid[2]
    valid = torch.arange(length)[None] < length - 3 if masked else None
    q, k, _ = torch.randn(3, 1, 1, length, 64).unbind()
    plan = build_plan(q, k, Settings(tile_keys=tile_keys), TokenLayout(grid, key_valid=valid), impl="torch")
    assert plan.gathers == gathers
