"""What the page is told: kinds of steps, limits of size, and how often it is sent."""

import base64
import dataclasses
import importlib
import json
import sys
import types
from pathlib import Path

import pytest
from fgattn.outcomes import Outcome, Reason
from fgattn.runs.reports import BlockReport, CellReport, RunReport, StepReport
from fgattn.show import snapshot
from makers import CHOSEN, by_reason

ROOT = Path(__file__).parents[2]
EMPTY = RunReport(CHOSEN, 0, "torch", "cpu", 0.0, (), (), {}, None, None, None, None, None, None)


def report(steps=4, blocks=3, **changes):
    return dataclasses.replace(
        EMPTY,
        steps=tuple(
            StepReport(i, 3.6e6 + i, 1.2345678e6, 0.1234567, 3, 0, estimated_error=0.0123456)
            for i in range(steps)
        ),
        blocks=tuple(BlockReport(i, 1 / 3, 0.5, 0.0123456) for i in range(blocks)),
        cells=tuple(CellReport(s, b, b / blocks) for s in range(steps) for b in range(blocks)),
        estimated_error=0.0123456,
        calls=by_reason(sparse=steps * blocks),
        density=1 / 3,
        executed_density=0.5,
        dense_call=2.0,
        sparse_call=1.0,
        scheduled=steps,
        total=3.6e6 * steps,
        **changes,
    )


def make(given, state="running"):
    return snapshot.snapshot(given, "3", "run", state)


def test_kinds_of_steps():
    """Warm-up and other dense steps, sparse ones, and sparse ones that planned nothing."""
    steps = (
        StepReport(0, 1, 1, 0, 0, 4, True),
        StepReport(1, 1, 1, 0, 0, 4),
        StepReport(2, 1, 1, 0.5, 3, 1),
        StepReport(3, 1, 1, 0.0, 4, 0),
    )
    made = make(dataclasses.replace(EMPTY, steps=steps, scheduled=9, calls=by_reason(sparse=1)))
    assert [s["kind"] for s in made["timeline"]] == ["warm-up", "dense", "sparse", "reused"]
    assert (made["step"], made["steps"]) == (4, 9)


def test_a_step_that_was_cut_short_is_not_shown():
    """Its time says nothing; a run that went dense after an error finished its steps."""
    assert [len(make(report(), s)["timeline"]) for s in ("done", "interrupted", "failed")] == [4, 3, 3]
    assert len(make(report(failure="OSError: x"), "done")["timeline"]) == 4


def test_sixty_blocks_and_a_hundred_steps_fit():
    """The largest usual run."""
    assert len(json.dumps(make(report(100, 60))).encode()) < snapshot.MAX_BYTES


def test_the_worst_run_fits():
    """Long texts that JSON escapes, more of everything than anybody has."""
    long = "\u6c49" * 1000
    worst = report(1000, 1000, failure=long)
    worst = dataclasses.replace(
        worst,
        settings=dataclasses.replace(
            CHOSEN, method="hierarchical", strength=1 / 3, moved_threshold=1 / 7, moved_warmup_steps=10**4
        ),
        calls={Reason(Outcome.MIN_TOKENS, f"{i}{long}"): 10**9 for i in range(50)},
        tokens=10**7,
        sliders=tuple((1000 + i, 1.234567890123, 50) for i in range(500)),
        steps=tuple(dataclasses.replace(s, sparse_calls=0, index=s.index + 1000) for s in worst.steps),
    )
    made = make(worst)
    assert len(json.dumps(made).encode()) < snapshot.MAX_BYTES
    assert made["timeline"][-1]["index"] == 1999 and made["step"] == 2000


def test_settings_and_outcomes_are_fields():
    """A code that stays for programs, a text for people; settings are no sentence."""
    made = make(
        dataclasses.replace(
            EMPTY, calls={Reason(Outcome.SPARSE): 9, Reason(Outcome.MIN_TOKENS, "fewer than 4096 tokens"): 3}
        )
    )
    assert made["settings"] == dataclasses.asdict(CHOSEN)
    assert made["calls"] == (
        {"outcome": "sparse", "text": "sparse", "number": 9},
        {"outcome": "min_tokens", "text": "fewer than 4096 tokens", "number": 3},
    )


def heat(made):
    """[steps, blocks] of a message's heat map."""
    cells, rows = base64.b64decode(made["heat"]), len(made["blocks"])
    return [list(cells[i : i + rows]) for i in range(0, len(cells), rows)]


def test_heat_map():
    """A byte for each block in each step: 0 where nothing was sparse, else 1 to 255."""
    given = dataclasses.replace(
        report(3, 2), cells=(CellReport(1, 0, 0.0), CellReport(1, 1, 0.5), CellReport(2, 1, 1.0))
    )
    assert heat(make(given)) == [[0, 0], [1, 128], [0, 255]]
    assert heat(make(given, "interrupted")) == [[0, 0], [1, 128]]
    assert make(EMPTY)["heat"] == "" and make(report(0, 2))["heat"] == ""


@pytest.mark.parametrize(("steps", "blocks", "columns"), [(20, 40, 20), (50, 60, 50), (100, 8, 100)])
def test_the_heat_map_of_usual_runs_is_whole(steps, blocks, columns):
    assert len(heat(make(report(steps, blocks)))) == columns


def test_the_heat_map_takes_what_is_left():
    """The last steps of a run that is too large for all of them."""
    columns = heat(make(report(100, 64)))
    assert 40 < len(columns) < 100
    assert columns[-1] == [1 + round(254 * b / 64) for b in range(64)]


def test_estimated_errors_have_two_digits():
    made = make(report())
    for part in (made, made["timeline"][0], made["blocks"][0]):
        assert part["estimated_error"] == 0.012 and "error" not in part
    assert made["headline"] == "sparse: 33 % of scores, attention 2.00x faster, est. error 1.2 %"
    assert make(EMPTY)["estimated_error"] is None


@pytest.mark.parametrize(
    ("given", "state", "shown", "text"),
    [
        (EMPTY, "running", "running", "waiting for the first step"),
        (EMPTY, "done", "done", "attention never reached FG-Attn"),
        (report(failure="OSError: x"), "done", "failed", "dense after an error: OSError: x"),
        (report(failure="OSError: x"), "running", "running", "dense after an error: OSError: x"),
        (
            report(),
            "interrupted",
            "interrupted",
            "sparse: 33 % of scores, attention 2.00x faster, est. error 1.2 %",
        ),
        (
            dataclasses.replace(report(), density=None),
            "running",
            "running",
            "sparse: attention 2.00x faster, est. error 1.2 %",
        ),
    ],
    ids=["start", "nothing", "failed", "failing", "stopped", "densities on their way"],
)
def test_state_and_headline(given, state, shown, text):
    made = make(given, state)
    assert (made["state"], made["headline"]) == (shown, text)


@pytest.fixture
def live(monkeypatch):
    """nodes/live.py, loaded without the package around it, which needs ComfyUI; with a clock of ours."""
    for name, path in (("bare", ROOT), ("bare.nodes", ROOT / "nodes")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        monkeypatch.setitem(sys.modules, name, package)
    for name in [n for n in sys.modules if n.partition(".")[0] == "fgattn"]:  # outcomes are one enum
        monkeypatch.setitem(sys.modules, f"bare.{name}", sys.modules[name])
    module = importlib.import_module("bare.nodes.live")
    clock = types.SimpleNamespace(
        now=100.0, perf_counter=lambda: clock.now, time_ns=lambda: int(clock.now * 1e9)
    )
    monkeypatch.setattr(module, "time", clock)
    module.clock = clock
    yield module
    for name in [n for n in sys.modules if n.startswith("bare")]:
        del sys.modules[name]


@pytest.fixture
def server(monkeypatch, live):
    """A server with one client; `sent` has (time, event, data, client)."""
    sent = []
    instance = types.SimpleNamespace(
        client_id="tab",
        sent=sent,
        texts=[],
        send_sync=lambda *message: sent.append((live.clock.now, *message)),
        send_progress_text=lambda *message, sid: instance.texts.append((*message, sid)),
    )
    module = types.ModuleType("server")
    module.PromptServer = types.SimpleNamespace(instance=instance)
    monkeypatch.setitem(sys.modules, "server", module)
    return instance


def sample(live, one, evaluations, seconds, state="done"):
    one.begin()
    for _ in range(evaluations):
        live.clock.now += seconds
        one.update()
    one.end(report(), state)


def test_at_most_five_a_second(live, server):
    """Fast steps, and runs one after the other; the last word of a run always comes."""
    one = live.Live("3", report)
    for _ in range(3):
        sample(live, one, 1000, 0.003)
    times = [t for t, *_ in server.sent]
    assert max(sum(a <= t < a + 1 for t in times) for a in times) <= 5
    assert len(times) > 3 * 3 * 3
    assert [d["state"] for _, _, d, _ in server.sent].count("done") == 3
    assert len({d["run"] for _, _, d, _ in server.sent}) == 3


def test_slow_steps_are_all_told(live, server):
    """To the client that queued the prompt, with this node's id."""
    sample(live, live.Live("3", report), 4, 1.0, "interrupted")
    assert [(e, d["node"], d["state"], c) for _, e, d, c in server.sent] == [
        ("fgattn.progress", "3", "running", "tab")
    ] * 5 + [("fgattn.progress", "3", "interrupted", "tab")]
    json.dumps(server.sent)


def test_the_node_says_what_it_does_without_javascript(live, server):
    """The server's own text, to the same client; the last word comes from the patch."""
    sample(live, live.Live("3", report), 2, 1.0)
    line = "sparse: 33 % of scores, attention 2.00x faster, est. error 1.2 %, step 4 of 4"
    assert server.texts == [(line, "3", "tab")] * 3


def test_updates_cost_little(live, server):
    """Reading that takes long is done seldom: one per cent of the time."""

    def slow():
        live.clock.now += 0.1
        return report()

    one = live.Live("3", slow)
    for _ in range(1000):
        one.update()
        live.clock.now += 0.1
    assert 9 <= len(server.sent) <= 12


@pytest.mark.parametrize("missing", ["server", "instance", "client", "node"])
def test_nobody_to_tell(live, server, monkeypatch, missing):
    """A script, a start without a server, a prompt from the API, a node without id: nothing is even read."""
    if missing == "server":
        monkeypatch.setitem(sys.modules, "server", None)
    elif missing == "instance":
        del sys.modules["server"].PromptServer.instance
    elif missing == "client":
        server.client_id = None
    read = []
    one = live.Live(None if missing == "node" else "3", lambda: read.append(1))
    sample(live, one, 5, 1.0)
    assert not server.sent and not read


def test_no_run_sends_nothing(live, server):
    """The engine could not start: there is nothing to tell."""
    live.Live("3", lambda: None).begin()
    assert not server.sent


@pytest.mark.parametrize("where", ["reading", "sending"])
def test_a_failure_never_reaches_the_render(live, server, caplog, where):
    """It is logged once, the next run tries again."""

    def broken(*args):
        raise RuntimeError("out of luck")

    if where == "sending":
        server.send_sync = broken
    one = live.Live("3", broken if where == "reading" else report)
    sample(live, one, 5, 1.0)
    assert [bool(r.exc_info) for r in caplog.records] == [True] and not server.sent
    sample(live, one, 5, 1.0)
    assert len(caplog.records) == 2


def test_pages_get_their_own_runs_back(live, server):
    """Two tabs, nodes of the same id: the last message of each run, for the page that queued it."""
    recent = sys.modules["bare.nodes.recent"].RECENT
    one = live.Live("3", report)
    for client, state in (("tab", "done"), ("other", "interrupted"), ("tab", "failed")):
        server.client_id = client
        sample(live, one, 5, 1.0, state)
    assert [m["state"] for m in recent.of("tab")] == ["done", "failed"]
    assert [m["state"] for m in recent.of("other")] == ["interrupted"]
    assert recent.of("third") == recent.of(None) == []


def test_few_runs_are_remembered(live, server):
    """A server that runs for weeks; the oldest are forgotten."""
    module = sys.modules["bare.nodes.recent"]
    for _ in range(10 * module.KEPT):
        sample(live, live.Live("3", report), 2, 1.0)
    assert len(module.RECENT.of("tab")) == module.KEPT
    assert module.RECENT.of("tab")[-1] == server.sent[-1][2]


def test_a_message_that_cannot_be_sent_is_remembered(live, server):
    """The connection is what failed; the page asks when it is back."""

    def broken(*_):
        raise ConnectionError

    server.send_sync = broken
    live.Live("3", report).end(report(), "done")
    assert len(sys.modules["bare.nodes.recent"].RECENT.of("tab")) == 1
