"""Live statistics of a real run, as the page gets them."""

import json
import sys
import types

import pytest
from makers import by_text


@pytest.fixture
def told(pack, monkeypatch):
    """Messages to the page; every update goes."""
    live = sys.modules["fgattn_pack.nodes.live"]
    sent = []
    server = types.SimpleNamespace(
        client_id="tab",
        send_sync=lambda event, data, client: sent.append((event, data, client)),
        send_progress_text=lambda text, node_id, sid: None,
    )
    monkeypatch.setattr(live, "prompt_server", lambda: server)
    monkeypatch.setattr(live, "INTERVAL", 0.0)
    monkeypatch.setattr(live, "COST_SHARE", 1e9)
    return sent


def test_a_run_is_told_step_by_step(wan, sample, patched, report, told):
    """Every evaluation knows one step more; the last message is the report."""
    model = patched(wan, warmup_steps=2)
    sample(model)
    data = [d for _, d, _ in told]
    assert {(event, client) for event, _, client in told} == {("fgattn.progress", "tab")}
    assert [d["state"] for d in data] == ["running"] * 9 + ["done"]
    assert [d["step"] for d in data] == [0, *range(8), 8] and data[-1]["steps"] == 8
    assert [s["kind"] for s in data[-1]["timeline"]] == ["warm-up"] * 2 + ["sparse"] * 6
    assert data[0]["headline"] == "waiting for the first step"
    assert data[3]["headline"] == "dense: warm-up step"
    last = report(model)
    assert data[-1]["density"] == pytest.approx(last.density, abs=1e-3)
    assert data[-1]["timeline"][0]["total"] == data[5]["timeline"][0]["total"]
    assert [b["block"] for b in data[-2]["blocks"]] == [0, 1, 2]
    assert {c["text"]: c["number"] for c in data[-1]["calls"]} == by_text(last)
    json.dumps(told)


def test_steps_that_reuse_plans_are_told_apart(wan, sample, patched, told):
    """Every second sparse step plans nothing."""
    sample(patched(wan, warmup_steps=2, reuse_steps=2))
    kinds = [s["kind"] for s in told[-1][1]["timeline"]]
    assert kinds == ["warm-up"] * 2 + ["sparse", "reused"] * 3


def test_the_end_is_told_however_it_comes(wan, sample, patched, told, monkeypatch):
    """Stopped by the user, failed elsewhere, failed in our path."""
    from comfy.model_management import InterruptProcessingException

    execute = sys.modules["fgattn_pack.fgattn.backends.execute"]

    def raising(error):
        def broken(*args, **kwargs):
            raise error

        return broken

    monkeypatch.setattr(execute, "plan_of", raising(InterruptProcessingException()))
    with pytest.raises(InterruptProcessingException):
        sample(patched(wan))
    monkeypatch.setattr(execute, "plan_of", raising(RuntimeError("out of luck")))
    sample(patched(wan), steps=4)
    model = wan.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = raising(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        sample(patched(model), steps=4)
    ends = [d for _, d, _ in told if d["state"] != "running"]
    assert [d["state"] for d in ends] == ["interrupted", "failed", "failed"]
    assert "out of luck" in ends[1]["headline"]


def test_a_page_that_was_away_gets_the_last_messages(wan, sample, patched, told, monkeypatch):
    """Over HTTP as the page asks: its own runs, the last message of each, oldest first; no other page's."""
    import asyncio

    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    recent = sys.modules["fgattn_pack.nodes.recent"]
    runs = recent.Recent()  # those of this test alone
    monkeypatch.setattr(sys.modules["fgattn_pack.nodes.live"], "RECENT", runs)
    for steps in (4, 8):
        sample(patched(wan), steps=steps)
    server = types.SimpleNamespace(routes=web.RouteTableDef())
    recent.serve(server, runs)

    async def ask(*pages):
        app = web.Application()
        app.add_routes(server.routes)
        async with TestClient(TestServer(app)) as client:
            return [await (await client.get(recent.ROUTE, params=page)).json() for page in pages]

    mine, other, nobody = asyncio.run(ask({"client": "tab"}, {"client": "another"}, {}))
    assert mine == json.loads(json.dumps([d for _, d, _ in told if d["state"] == "done"]))
    assert [m["steps"] for m in mine] == [4, 8] and other == nobody == []


def test_a_failure_in_the_statistics_leaves_the_render_alone(wan, sample, patched, told, monkeypatch):
    """The picture is the same, bit by bit."""
    import torch

    wanted = sample(patched(wan))
    stats = sys.modules["fgattn_pack.fgattn.runs.stats"]

    def broken(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(stats.RunStats, "so_far", broken)
    assert torch.equal(sample(patched(wan)), wanted)
