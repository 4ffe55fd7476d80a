"""Sliders that the page moves while the model samples, over the pack's route."""

import asyncio
import gzip
import json
import sys
import types

import pytest
import torch


@pytest.fixture
def sliders(pack, monkeypatch):
    """The module, with a page "tab" that queued the prompt."""
    module = sys.modules["fgattn_pack.nodes.sliders"]
    monkeypatch.setattr(module, "prompt_server", lambda: types.SimpleNamespace(client_id="tab"))
    return module


@pytest.fixture
def moving(sliders):
    """Sampler callback: posts what is given for a step; answers collect in `.answers`."""

    def make(moves):
        def callback(step, *_):
            if step in moves:
                callback.answers.append(sliders.SLIDERS.move(moves[step])[0])

        callback.answers = []
        return callback

    return make


def message(threshold, warmup_steps=0, client="tab", node="1"):
    return {"client": client, "node": node, "threshold": threshold, "warmup_steps": warmup_steps}


def test_a_move_acts_from_the_next_step_and_can_be_repeated(wan, sample, patched, report, moving):
    """The callback comes after its step, so a move in step 2 is in force in step 3."""
    model = patched(wan, live=True)
    moves = {2: message(0.0), 5: message(4.0, 2)}
    first = moving(moves)
    wanted = sample(model, callback=first)
    assert first.answers == [200, 200]
    assert report(model).sliders == ((0, 1.0, 0), (3, 0.0, 0), (6, 4.0, 2))
    kept = [s for s in report(model).steps if s.sparse_calls]
    assert len(kept) == 8
    assert torch.equal(sample(model, callback=moving(moves)), wanted)
    assert not torch.equal(sample(model), wanted)
    assert report(model).sliders == ((0, 1.0, 0),)


def test_only_the_page_that_queued_and_only_its_running_node(wan, sample, patched, report, moving):
    """Other pages, other nodes, wrong values and nonsense change nothing."""
    refused = [
        (message(2.0, client="other"), 404),
        (message(2.0, node="2"), 404),
        (message(2.0, client=None), 404),
        (message(-1.0), 400),
        (message("2"), 400),
        (message(2.0, 1.5), 400),
        (message(10**400), 400),
        (message(1e300), 400),
        (message(8.05), 400),
        (message(True), 400),
        (message(float("nan")), 400),
        (message("x" * 20_000_000), 400),
        (message(1.0, 10**9), 400),
        (message(1.0, 51), 400),
        (message(1.0, True), 400),
        (None, 400),
        ([], 400),
        ({}, 400),
        ({**message(2.0), "tile_keys": 1}, 400),
    ]
    model = patched(wan, live=True)
    answers = []
    for part in (refused[:5], refused[5:12], refused[12:]):
        callback = moving({step: given for step, (given, _) in enumerate(part)})
        sample(model, callback=callback)
        answers += callback.answers
        assert len(report(model).sliders) == 1
    assert answers == [status for _, status in refused]


def test_nothing_moves_with_the_switch_off_or_after_the_run(wan, sample, patched, report, moving, sliders):
    """Off is the default."""
    model, callback = patched(wan), moving({1: message(0.0)})
    sample(model, callback=callback)
    assert callback.answers == [404] and len(report(model).sliders) == 1
    sample(patched(wan, live=True))
    assert sliders.SLIDERS.move(message(0.0))[0] == 404


def test_an_error_closes_the_door(wan, sample, patched, sliders):
    """A run that ends in any way leaves nothing behind."""

    def broken(*_):
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError):
        sample(patched(wan, live=True), callback=broken)
    assert sliders.SLIDERS.move(message(0.0))[0] == 404


def test_the_route(sliders, pack):
    """As a page calls it, through aiohttp."""
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    engine = types.SimpleNamespace(moved=[], move=lambda *values: engine.moved.append(values) or True)

    async def talk():
        server = types.SimpleNamespace(routes=web.RouteTableDef())
        sliders.serve(server)
        app = web.Application()
        app.add_routes(server.routes)
        answers = []
        async with TestClient(TestServer(app)) as client:
            with sliders.SLIDERS.during("1", engine):
                for given in (
                    dict(json=message(1.5, 2)),
                    dict(data="{"),
                    dict(data=""),
                    dict(json=message(1, node=9)),
                ):
                    answer = await client.post("/fgattn/sliders", **given)
                    answers.append((answer.status, await answer.json()))
        return answers

    answers = asyncio.run(talk())
    assert answers[0] == (200, {}) and engine.moved == [(1.5, 2)]
    assert [status for status, _ in answers[1:]] == [400, 400, 404]
    assert all(body["refused"] for _, body in answers[1:])


GZIP = {"Content-Encoding": "gzip"}


@pytest.mark.parametrize(
    ("data", "headers"),
    [
        (b"[" * 2000, {}),
        (b"[" * 200_000, {}),
        (b'{"a":' * 800, {}),
        (b"{}", {"Content-Type": "application/json; charset=klingon"}),
        (b"\xff\xfe{}", {}),
        (b"no gzip", GZIP),
        (gzip.compress(b"{}" * 99)[:-20], GZIP),
        (gzip.compress(b"0" * 20_000_000), GZIP),
        (json.dumps({"client": "tab", "node": "1", "threshold": "x" * 20_000_000, "warmup_steps": 0}), {}),
        (b"9" * 4000, {}),
    ],
    ids=["deep", "deeper", "deep objects", "charset", "no text", "gzip", "cut", "bomb", "20 MB", "digits"],
)
def test_what_cannot_be_read_is_refused(sliders, data, headers):
    """With a short reason, never as an error of the server; a long value is not sent back."""
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    async def talk():
        server = types.SimpleNamespace(routes=web.RouteTableDef())
        sliders.serve(server)
        app = web.Application(client_max_size=100 << 20)  # about as ComfyUI has it
        app.add_routes(server.routes)
        async with TestClient(TestServer(app)) as client:
            answer = await client.post("/fgattn/sliders", data=data, headers=headers, skip_auto_headers=())
            return answer.status, await answer.read()

    status, body = asyncio.run(talk())
    assert status == 400 and len(body) < 1000
    assert json.loads(body)["refused"]


def test_the_extension_serves_its_routes(pack, monkeypatch):
    """ComfyUI calls on_load once; a script has no server."""
    nodes = sys.modules["fgattn_pack.nodes"]
    served = []
    monkeypatch.setattr(nodes.sliders, "serve", served.append)
    monkeypatch.setattr(nodes.recent, "serve", served.append)
    monkeypatch.setattr(nodes, "prompt_server", lambda: "server")
    asyncio.run(nodes.FGAttnExtension().on_load())
    monkeypatch.setattr(nodes, "prompt_server", lambda: None)
    asyncio.run(nodes.FGAttnExtension().on_load())
    assert served == ["server"] * 2
