"""Backends: which one takes a call, why not another, and that a new one is one record."""

import contextlib
import dataclasses
import json
import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fgattn import InvalidArgument, Settings, TokenLayout, Unsupported, attend, build_plan, sparse_attention
from fgattn import __main__ as doctor
from fgattn import tensors as inputs
from fgattn.backends import compile_log, hopper, pytorch, registry, selftest, triton
from fgattn.backends.base import Backend, Eligible, Planned
from fgattn.backends.hopper.boxes import boxes_for
from fgattn.backends.shared import available
from fgattn.call import Call
from fgattn.outcomes import Outcome, Reason
from fgattn.plan import KERNEL_ROWS
from fgattn.runs.engine import Engine
from fgattn.settings import Policy
from fgattn.show.text import headline, text
from makers import FULL
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
from fgattn.backends.shared import available

q, k, v = torch.randn(3, 1, 2, 256, 64).unbind()
layout, settings = fgattn.TokenLayout((4, 8, 8)), fgattn.Settings()
plan = fgattn.build_plan(q, k, settings, layout)
out = fgattn.attend(q, k, v, plan)
try:
    fgattn.attend(q, k, v, plan, impl="triton")
except fgattn.Unsupported as error:
    message = str(error)
one = engine.Engine(settings, engine.Policy(warmup_steps=0))
one.begin_run([1.0, 0.0], True, torch.device("cpu"))
one.attention(q, k, v, layout=layout, dense=lambda: 1 / 0)
print(json.dumps({
    "equal": torch.equal(out, fgattn.attend(q, k, v, plan, impl="torch")), "message": message,
    "missing": available.missing(),
    "calls": {reason.text: n for reason, n in one.end_run().calls.items()},
    "kernels": [name for name in sys.modules if name.startswith("fgattn.backends.shared.s")]}))
"""


def test_library_works_without_triton_and_comfyui():
    """Windows and macOS: everything but the kernel, and the reason for that one."""
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON, str(ROOT / "fgattn")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["equal"] and found["calls"] == {"sparse": 1} and found["kernels"] == []
    assert found["missing"] == "Triton is not installed"
    assert found["message"].startswith("impl: got 'triton'; allowed: torch or reference here. ")
    assert found["message"].endswith("The triton kernels cannot run: Triton is not installed.")


GPU = torch.device("cuda", 0)
LAYOUT = TokenLayout((4, 8, 8))


def a_call(settings=None, dim=64, dtype=torch.float32, layout=LAYOUT):
    q, k, v = torch.randn(3, 1, 2, layout.length, dim).to(dtype).unbind()
    return Call.to_plan(q, k, v, settings or Settings(), layout)


def on(device, call):
    """The call, as far as reasons can tell, on a device that is not there."""
    return SimpleNamespace(
        **{
            name: getattr(call, name)
            for name in ("q", "k", "v", "settings", "geometry", "key_valid", "layout", "declined")
        },
        device=device,
    )


@pytest.fixture
def fresh():
    """Verdicts are kept for a process: none from before, none left behind."""
    kept = (available.missing, available.device_reason, hopper.device_reason, selftest.failure)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


@pytest.mark.skipif(available.missing() is not None, reason="Triton is not installed: it has no limits")
@pytest.mark.parametrize(
    ("dim", "dtype", "reason"),
    [
        (40, torch.float32, "head size 40 (the kernel has 64, 128)"),
        (64, torch.float64, "float64"),
        (64, torch.bfloat16, "no Triton kernel for device type cpu"),
    ],
    ids=["head size", "float64", "device"],
)
def test_reason_why_the_kernels_cannot_run(dim, dtype, reason):
    """Shown to users; the node counts calls under it."""
    assert triton.BACKEND.reason(a_call(dim=dim, dtype=dtype)) == reason


def test_a_cpu_runs_pytorch():
    """Triton's interpreter is for tests: no way to run a model, though it can be asked for by name."""
    for gain in (False, True):
        answer = registry.choose(a_call(), gain=gain)
        assert (answer.backend, answer.text) == (pytorch.BACKEND, "torch")
    assert registry.on_device(torch.device("cpu"), Settings()).backend is pytorch.BACKEND


def test_hopper_needs_a_hopper_gpu():
    """Asking for it elsewhere is refused with the reason; nothing is tried."""
    call = a_call(dtype=torch.bfloat16)
    assert hopper.BACKEND.reason(call) == "no Hopper GPU: cpu"
    plan = build_plan(call.q, call.k, Settings(), LAYOUT)
    with pytest.raises(Unsupported, match="The hopper kernels cannot run: no Hopper GPU: cpu"):
        attend(call.q, call.k, call.v, plan, impl="hopper")


@pytest.mark.parametrize(
    ("capability", "gluon", "says"),
    [
        ((9, 0), True, None),
        ((8, 9), True, "no Hopper GPU: compute capability 8.9, not 9.0"),
        ((9, 0), False, "this Triton lacks what the Hopper kernel needs: "),
    ],
    ids=["Hopper", "Ada", "Triton without Gluon"],
)
def test_why_there_is_no_hopper_kernel(capability, gluon, says, fresh, monkeypatch):
    """The GPU and the features of Triton decide, not version strings."""
    pytest.importorskip("triton.experimental.gluon")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if not gluon:
        monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
        monkeypatch.delitem(sys.modules, "fgattn.backends.hopper.attend", raising=False)
        monkeypatch.delattr(hopper, "attend", raising=False)
    reason = hopper.device_reason(GPU)
    assert reason is None if says is None else reason.startswith(says)
    assert gluon or reason.endswith(hopper.TESTED)


@pytest.mark.parametrize(
    ("hopper_fails", "portable_fails", "dense", "runs", "tested"),
    [
        (None, None, None, "hopper", ["hopper"]),
        ("off by 2", None, None, f"triton (no hopper: off by 2; {hopper.TESTED})", ["hopper", "triton"]),
        (
            "off by 2",
            "no image",
            f"no image (no hopper: off by 2; {hopper.TESTED})",
            None,
            ["hopper", "triton"],
        ),
    ],
    ids=["Hopper", "portable", "dense"],
)
def test_every_step_down_has_its_reason(
    hopper_fails, portable_fails, dense, runs, tested, fresh, monkeypatch, caplog
):
    """Hopper, portable, dense: in the answer to the engine, in the doctor and in the log.

    A user who has lost the fast kernel reads which versions have it.
    """
    asked = []

    def wrong(backend, device, settings):
        asked.append(backend.name)
        return {"hopper": hopper_fails, "triton": portable_fails}[backend.name]

    call = on(GPU, a_call(dtype=torch.bfloat16))
    monkeypatch.setattr(selftest, "disagreement", wrong)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with caplog.at_level(logging.INFO, "fgattn"):
        answer = registry.choose(call, gain=True)
        again = registry.choose(call, gain=True)
    assert asked == tested, "each kernel is tried once, and only where the faster one failed"
    said = [
        f"FG-Attn leaves its {name} kernels: {fails}"
        for name, fails in (("hopper", hopper_fails), ("triton", portable_fails))
        if fails
    ]
    assert [r.getMessage() for r in caplog.records] == said
    monkeypatch.setattr(registry, "on_device", lambda device, settings: answer)
    if dense:
        assert answer == again == Reason(Outcome.NO_KERNEL, dense)
        assert doctor.verdict(GPU) == f"dense attention: {dense}"
    else:
        assert answer.text == again.text == runs
        assert doctor.verdict(GPU) == f"{runs}: its self-test passed"


def test_a_gpu_without_hopper_says_so(fresh, monkeypatch, caplog):
    """An Ada card: nothing failed, so no warning; the answer still says what does not run."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(selftest, "disagreement", lambda *_: None)
    answer = registry.choose(on(GPU, a_call()), gain=True)
    assert answer.text == "triton (no hopper: no Hopper GPU: compute capability 8.9, not 9.0)"
    assert not caplog.records


def test_an_old_gpu_says_so(fresh, monkeypatch):
    """Nothing is tried on a GPU that no kernel is for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An old card")
    assert registry.choose(on(GPU, a_call()), gain=True).text == (
        "An old card is older than compute capability 8.0 "
        "(no hopper: no Hopper GPU: compute capability 7.5, not 9.0)"
    )


def test_intel_is_left_to_the_self_test(fresh, monkeypatch):
    """Triton may run there: the kernels are tried, and a run takes them where they pass."""
    pytest.importorskip("triton")
    monkeypatch.setattr(selftest, "disagreement", lambda *_: None)
    answer = registry.choose(on(torch.device("xpu", 0), a_call()), gain=True)
    assert answer.text == "triton"


def test_broken_triton_is_a_reason(fresh, monkeypatch):
    """Installed, but for another driver or torch: everything but the kernels still works."""
    pytest.importorskip("triton")
    monkeypatch.setitem(sys.modules, "fgattn.backends.shared.planning", None)
    monkeypatch.delattr(sys.modules["fgattn.backends.shared"], "planning", raising=False)
    assert available.missing().startswith("Triton is installed but does not load: ModuleNotFoundError: ")
    q, k, v = torch.randn(3, 1, 1, 64, 64).unbind()
    plan = build_plan(q, k, Settings(), TokenLayout.flat(64))
    assert torch.equal(attend(q, k, v, plan), attend(q, k, v, plan, impl="torch"))


@pytest.mark.parametrize(
    ("module", "hit", "said"),
    [
        ("fgattn.backends.shared.select", False, ["FG-Attn is compiling kernels, once: select_kernel"]),
        ("fgattn.backends.shared.select", True, []),
        ("torch._inductor.runtime", False, []),
    ],
    ids=["new", "from the cache", "somebody else's"],
)
def test_compiling_is_announced(module, hit, said, caplog):
    """By Triton's own account: silent where its cache serves; whoever listened before still hears."""
    heard = []
    source = SimpleNamespace(name="select_kernel", fn=SimpleNamespace(__module__=module))
    event = {"src": source, "cache_hit": hit, "times": None}
    with caplog.at_level(logging.INFO, "fgattn"):
        compile_log.announced(None)(**event)
        assert [r.getMessage() for r in caplog.records] == said
        compile_log.announced(lambda **event: heard.append(event))(**event)
    assert heard == [event]


def test_compiling_is_heard_while_a_run_goes_on():
    """Triton's listener belongs to the process: it is ours from a run's start to the last run's end."""
    compilation = pytest.importorskip("triton").knobs.compilation
    before = compilation.listener
    one, other = (Engine(Settings(), Policy()) for _ in range(2))
    for engine in (one, other, one):
        engine.begin_run([1.0, 0.0], True, torch.device("cpu"))
        assert compilation.listener.__qualname__ == "announced.<locals>.listener"
    one.end_run()
    assert compilation.listener.__qualname__ == "announced.<locals>.listener"
    other.end_run()
    other.end_run()
    assert compilation.listener is before


def no_kernel(*_):
    raise RuntimeError("no kernel image\n  for this device")


def right(call, planned, tail, out):
    pytorch.BACKEND.attend(call, planned, tail, out)


def off(call, planned, tail, out):
    right(call, planned, tail, out)
    out *= 1.02


def toy(attend=right, **fields):
    """A backend of a test: PyTorch's, but for what is given."""
    fields = {
        "name": "toy",
        "reason": lambda call: None,
        "gains_on": lambda device: True,
        "probe": lambda call: Settings(threshold=1.5),
        **fields,
    }
    return dataclasses.replace(pytorch.BACKEND, attend=attend, **fields)


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (right, None),
        (off, "the kernels' self-test is off by 2."),
        (lambda call, planned, tail, out: out.fill_(torch.nan), "the kernels' self-test is off by nan"),
        (
            lambda call, planned, tail, out: out.copy_(scaled_dot_product_attention(call.q, call.k, call.v)),
            "the kernels' self-test is off by",
        ),
        (no_kernel, "the kernels do not compile or run here: RuntimeError: no kernel image for this device"),
    ],
    ids=["right", "2 % off", "NaN", "ignores the mask", "fails"],
)
def test_self_test(kernel, says, fresh, caplog):
    """A kernel that is wrong on this GPU must be found before it draws a picture, and said in the log."""
    result = selftest.failure(toy(kernel), torch.device("cpu"), Settings(threshold=1.5))
    assert result is None if says is None else result.startswith(says)
    assert len(caplog.records) == (result is not None)
    assert [bool(r.exc_info) for r in caplog.records] == [kernel is no_kernel] * len(caplog.records)


def test_self_test_compiles_ahead(fresh):
    """All kernels side by side, before the first one runs."""
    did = []

    @contextlib.contextmanager
    def compiling():
        did.append("begin")
        yield
        did.append("end")

    def kernel(call, planned, tail, out):
        did.append("attend")
        right(call, planned, tail, out)

    record = toy(kernel, compiling=compiling)
    assert selftest.failure(record, torch.device("cpu"), Settings(threshold=1.5)) is None
    assert did == ["begin", "attend", "end", "attend"]


def test_self_test_compares_plans(fresh):
    """A backend that selects other keys is as wrong as one that computes other numbers."""

    def selects_all(call):
        return pytorch.BACKEND.plan(dataclasses.replace(call, settings=Settings(threshold=0.0)))

    said = selftest.failure(toy(plan=selects_all), torch.device("cpu"), Settings(threshold=1.5))
    assert said == "the kernels' self-test selects other keys than the reference"


@pytest.mark.parametrize("error", FULL, ids=lambda error: f"{type(error).__name__} {str(error)[:40]}")
def test_a_full_gpu_says_nothing_of_the_kernels(error, fresh, monkeypatch):
    """Another model may fill it while the self-test runs: that must not last for the process."""
    monkeypatch.setattr(selftest, "disagreement", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        selftest.failure(pytorch.BACKEND, torch.device("cpu"), Settings())


@pytest.mark.parametrize(
    ("fails", "boxed", "by_rows"),
    [(set(), "hopper", "hopper"), ({1}, "hopper", "triton"), ({1, 16}, "triton", "triton")],
)
def test_each_way_to_bring_keys_has_its_self_test(fails, boxed, by_rows, fresh, monkeypatch):
    """A Triton that gathers wrongly must not cost TMA's way."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        selftest,
        "disagreement",
        lambda backend, device, settings: (
            "off" if backend.name == "hopper" and settings.tile_keys in fails else None
        ),
    )
    chosen = [
        registry.choose(on(GPU, a_call(Settings(tile_keys=n))), gain=True).backend.name for n in (16, 4)
    ]
    assert chosen == [boxed, by_rows]


@pytest.mark.parametrize(
    ("tile_keys", "grid", "masked", "by_rows"),
    [
        (16, (4, 8, 8), False, False),
        (8, (4, 8, 8), False, False),
        (4, (4, 8, 8), False, True),
        (16, (4, 8, 8), True, True),
        (16, (3, 5, 7), False, True),
    ],
)
def test_calls_whose_keys_come_by_rows(tile_keys, grid, masked, by_rows):
    """Octets of keys that are boxes in memory are fetched whole, everything else row by row."""
    length = grid[0] * grid[1] * grid[2]
    valid = torch.arange(length)[None] < length - 3 if masked else None
    call = a_call(Settings(tile_keys=tile_keys), layout=TokenLayout(grid, key_valid=valid))
    assert (boxes_for(call) is None) == by_rows
    expanded = dataclasses.replace(call, k=call.k[:, :1].expand(-1, 2, -1, -1))
    assert boxes_for(expanded) is None, "rows of expanded tensors overlap: TMA cannot address them"


def test_a_backend_is_one_record(fresh, monkeypatch):
    """Chosen, named, self-tested, reported and refused with its reason: nothing else has to know it."""
    ran = []

    def kernel(call, planned, tail, out):
        ran.append(call.q.shape[2])
        right(call, planned, tail, out)

    record = toy(kernel, reason=lambda call: "only even heads" if call.q.shape[1] % 2 else None)
    monkeypatch.setattr(registry, "BACKENDS", [record, *registry.BACKENDS])
    call = a_call()
    q, k, v = call.q, call.k, call.v
    out = sparse_attention(q, k, v, Settings(), LAYOUT)
    assert ran == [600, 256], "the self-test comes first"
    assert torch.equal(out, sparse_attention(q, k, v, Settings(), LAYOUT, impl="torch"))
    assert torch.equal(out, sparse_attention(q, k, v, Settings(), LAYOUT, impl="toy"))
    with pytest.raises(Unsupported, match="The toy kernels cannot run: only even heads"):
        sparse_attention(q[:, :1], k[:, :1], v[:, :1], Settings(), LAYOUT, impl="toy")
    with pytest.raises(InvalidArgument, match="toy, hopper, triton, torch, reference"):
        build_plan(q, k, Settings(), LAYOUT, impl="tuy")

    engine = Engine(Settings(), Policy(warmup_steps=0))
    engine.begin_run([1.0, 0.0], True, torch.device("cpu"))
    assert engine.attention(q, k, v, layout=LAYOUT, dense=lambda: 1 / 0) is not None
    assert "implementation: torch (no toy: only even heads)" in text(engine.end_run())
    always = toy(kernel)
    registry.BACKENDS[0] = always
    engine.begin_run([1.0, 0.0], True, torch.device("cpu"))
    engine.attention(q, k, v, layout=LAYOUT, dense=lambda: 1 / 0)
    report = engine.end_run()
    assert report.implementation == "toy" and headline(report).startswith("sparse")
    assert "toy: its self-test passed" in doctor.doctor()


def test_a_backend_that_fails_its_self_test_is_passed_over(fresh, monkeypatch):
    """Its reason reaches the report; the next one runs."""
    monkeypatch.setattr(registry, "BACKENDS", [toy(off), *registry.BACKENDS])
    answer = registry.choose(a_call(), gain=True)
    assert answer.text.startswith("torch (no toy: the kernels' self-test is off by 2.")


@pytest.mark.parametrize("question", ["gains_on", "reason", "probe"])
def test_a_record_that_fails_is_passed_over(question, fresh, monkeypatch, caplog):
    """Its name and the error reach the report and, once, the log; the next one runs."""

    def fails(_):
        raise KeyError("no such GPU")

    monkeypatch.setattr(registry, "BACKENDS", [toy(**{question: fails}), *registry.BACKENDS])
    registry._warn.cache_clear()
    for gain in (True, False, True):
        answer = registry.choose(a_call(), gain=gain)
        assert answer.text == f"torch (no toy: its {question} fails: KeyError: 'no such GPU')"
    (said,) = caplog.records
    assert said.getMessage() == (
        f"FG-Attn leaves its toy kernels: its {question} fails: KeyError: 'no such GPU'"
    )
    assert said.exc_info
    if question == "reason":
        with pytest.raises(Unsupported, match="The toy kernels cannot run: its reason fails: KeyError"):
            sparse_attention(*torch.randn(3, 1, 2, 256, 64), Settings(), LAYOUT, impl="toy")


@pytest.mark.parametrize("error", FULL, ids=lambda error: f"{type(error).__name__} {str(error)[:40]}")
def test_a_full_gpu_says_nothing_of_a_record(error, monkeypatch):
    """The next call asks again."""

    def fails(_):
        raise error

    monkeypatch.setattr(registry, "BACKENDS", [toy(reason=fails), *registry.BACKENDS])
    with pytest.raises(type(error)):
        registry.choose(a_call())


@pytest.mark.parametrize("said", ["", "only even heads"])
def test_a_reason_is_a_reason(said, fresh, monkeypatch):
    """Chosen or named, a backend runs a call where its reason is None and nowhere else."""
    monkeypatch.setattr(registry, "BACKENDS", [toy(reason=lambda call: said), *registry.BACKENDS])
    reason = said or "it does not say why"
    assert registry.choose(a_call()).text == f"torch (no toy: {reason})"
    assert registry.named(a_call(), "toy") == Reason(Outcome.DECLINED, reason)


def test_what_else_can_run_is_asked(fresh, monkeypatch):
    """A refusal names the backends that take this call, whatever their names; without a name it has none."""
    no = {"reason": lambda call: "only even heads"}
    yes, fails = toy(name="other", probe=None), toy(name="broken", attend=off)
    monkeypatch.setattr(registry, "BACKENDS", [toy(**no), yes])
    q = torch.randn(1, 2, 256, 64)
    with pytest.raises(Unsupported, match=r"^impl: got 'toy'; allowed: other here\. The toy kernels cannot"):
        build_plan(q, q, Settings(), LAYOUT, impl="toy")
    monkeypatch.setattr(registry, "BACKENDS", [toy(**no)])
    with pytest.raises(Unsupported, match=r"^impl: got 'toy'; allowed: nothing here\."):
        build_plan(q, q, Settings(), LAYOUT, impl="toy")
    with pytest.raises(
        Unsupported, match=r"None; allowed: nothing here\. Kernels cannot run: only even heads\."
    ):
        build_plan(q, q, Settings(), LAYOUT)
    monkeypatch.setattr(registry, "BACKENDS", [toy(**no), fails])
    with pytest.raises(
        Unsupported, match=r"None; allowed: broken here\. Kernels cannot run: the kernels' self-t"
    ):
        build_plan(q, q, Settings(), LAYOUT)


def test_impl_reaches_planning_and_attention(monkeypatch):
    """The one that was asked for does both."""
    seen = []

    def plan(call):
        seen.append("plan")
        return pytorch.BACKEND.plan(call)

    def kernel(call, planned, tail, out):
        seen.append("attend")
        right(call, planned, tail, out)

    monkeypatch.setattr(registry, "BACKENDS", [*registry.BACKENDS, toy(kernel, plan=plan)])
    q, k, v = torch.randn(3, 1, 2, 256, 64).unbind()
    sparse_attention(q, k, v, Settings(), LAYOUT, impl="toy")
    assert seen == ["plan", "attend"]
    build_plan(q, k, Settings(), LAYOUT, impl="toy")
    assert seen == ["plan", "attend", "plan"]


def test_a_call_is_checked_once(monkeypatch):
    """By library and engine: tensors, each backend's reason, and the engine's own questions."""
    asked = Counter()

    def counting(name, function):
        def counted(*args, **options):
            asked[name] += 1
            return function(*args, **options)

        return counted

    record = toy(reason=counting("reason", lambda call: None), probe=None)
    monkeypatch.setattr(registry, "BACKENDS", [record])
    monkeypatch.setattr("fgattn.call.declined", counting("declined", inputs.declined))
    monkeypatch.setattr("fgattn.call.check_tensors", counting("shapes", inputs.check_tensors))
    monkeypatch.setattr(registry, "choose", counting("choose", registry.choose))
    q, k, v = torch.randn(3, 1, 4, 256, 64).unbind()
    monkeypatch.setattr("fgattn.attention.parts_for", lambda call: 2)
    sparse_attention(q, k, v, Settings(), LAYOUT)
    assert asked == {"reason": 1, "declined": 1, "shapes": 1, "choose": 1}
    plan = build_plan(q, k, Settings(), LAYOUT)
    asked.clear()
    attend(q, k, v, plan)
    assert asked == {"reason": 1, "declined": 1, "shapes": 1, "choose": 1}
    engine = Engine(Settings(), Policy(warmup_steps=0))
    engine.begin_run([1.0, 0.0], True, torch.device("cpu"))
    monkeypatch.setattr("fgattn.runs.engine.parts_for", lambda call: 2)
    asked.clear()
    engine.attention(q, k, v, layout=LAYOUT, dense=lambda: 1 / 0, block=0)
    assert asked == {"reason": 1, "declined": 1, "shapes": 1, "choose": 1}


def test_types_are_converted_once():
    """fp32 on a GPU is computed in bf16: three copies a call, whoever asks for the tensors."""
    call = a_call(dtype=torch.bfloat16)
    assert call.tensors is call.tensors
    assert [part.q.shape[1] for _, part in call.in_parts(2)] == [1, 1]
    assert next(call.in_parts(1))[1] is call


def test_records_are_complete():
    """Each has what the library asks of it; names are different."""
    assert len({backend.name for backend in registry.BACKENDS}) == len(registry.BACKENDS)
    for backend in registry.BACKENDS:
        assert isinstance(backend, Backend) and backend.name
        assert (backend.probe is None) == (backend.compiling is None)
        assert backend.probe is None or backend.probe(a_call()).tile_queries >= KERNEL_ROWS
    assert Eligible(pytorch.BACKEND).text == "torch" and Planned(None).made is None
