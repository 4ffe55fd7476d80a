"""As much of ComfyUI's server as its page needs for this pack; what it sends, a test says."""

import asyncio
import json
import struct
import threading
from pathlib import Path

from aiohttp import WSMsgType, web

WEB = Path(__file__).parents[2] / "web"
NODES = json.loads((Path(__file__).parent / "object_info.json").read_text(encoding="utf-8"))
LOCALES = WEB.parent / "locales"
TEXT = 3  # type of a binary message that holds text for a node
# What the page asks for and does not need here; anything else is an error that a test shows.
EMPTY = {
    "/embeddings": [],
    "/models": [],
    "/experiment/models": [],
    "/workflow_templates": {},
    "/users": {},
    "/history": {},
    "/queue": {"queue_running": [], "queue_pending": []},
    "/global_subgraphs": {},
    "/node_replacements": {},
    "/features": {},
    "/userdata": [],
    "/v2/userdata": [],
    "/assets": {"assets": []},
    "/jobs": {"jobs": [], "pagination": {"total": 0, "offset": 0, "limit": 0, "has_more": False}},
    "/internal/logs": "",
    "/internal/logs/raw": {"entries": [], "size": {"cols": 80, "rows": 24}},
    "/internal/folder_paths": {},
    "/prompt": {"exec_info": {"queue_remaining": 0}},
    "/system_stats": {
        "system": {
            "os": "linux",
            "python_version": "3",
            "embedded_python": False,
            "comfyui_version": "0.19.3",
            "pytorch_version": "2",
            "argv": [],
            "ram_total": 1,
            "ram_free": 1,
        },
        "devices": [],
    },
}


class Server:
    """A frontend on a port of its own, in a thread; `with` starts and stops it.

    Attributes:
        queued: prompts that the page queued.
        moved: messages to the pack's slider route.
    """

    def __init__(self, frontend: Path, settings: dict):
        self.frontend, self.settings = frontend, dict(settings)
        self.queued, self.moved, self.userdata = [], [], {}
        self._runs = {}  # last message of each run
        self._sockets = {}
        self._loop = asyncio.new_event_loop()

    def __enter__(self):
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        if not started.wait(30):
            raise RuntimeError("the server did not start")
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def send(self, event: str, data: dict) -> None:
        """A message to the page, as `send_sync` of ComfyUI's server."""
        if isinstance(data, dict) and "run" in data:
            self._runs[data["run"]] = data
        self._send(lambda socket: socket.send_json({"type": event, "data": data}))

    def send_text(self, text: str, node: str) -> None:
        """As `send_progress_text` of ComfyUI's server."""
        packed = struct.pack(">II", TEXT, len(node)) + node.encode() + text.encode()
        self._send(lambda socket: socket.send_bytes(packed))

    def drop(self) -> None:
        """The connection is lost."""
        self._send(lambda socket: socket.close())

    def _send(self, action) -> None:
        async def all_of_them():
            for socket in list(self._sockets.values()):
                await action(socket)

        asyncio.run_coroutine_threadsafe(all_of_them(), self._loop).result(10)

    def _serve(self, started) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/"
        started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())

    async def _answer(self, request) -> web.StreamResponse:
        path = request.path.removeprefix("/api")
        if path == "/ws":
            return await self._socket(request)
        if path == "/object_info":
            return web.json_response(NODES)
        if path == "/i18n":
            return web.json_response(
                {
                    folder.name: {
                        "nodeDefs": json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))
                    }
                    for folder in LOCALES.iterdir()
                }
            )
        if path == "/extensions":
            return web.json_response(
                [f"/extensions/fg-attn/{p.relative_to(WEB).as_posix()}" for p in sorted(WEB.rglob("*.js"))]
            )
        if path.startswith("/extensions/fg-attn/"):
            return web.FileResponse(WEB / path.removeprefix("/extensions/fg-attn/"))
        if path.startswith("/settings"):
            return await self._settings(request, path.removeprefix("/settings").removeprefix("/"))
        if path == "/fgattn/runs":
            return web.json_response(list(self._runs.values()))
        if request.method == "POST" and path == "/fgattn/sliders":
            self.moved.append(await request.json())
            return web.json_response({})
        if request.method == "POST" and path == "/prompt":
            self.queued.append(await request.json())
            number = len(self.queued)
            return web.json_response({"prompt_id": f"p{number}", "number": number, "node_errors": {}})
        if path.startswith("/userdata/"):
            return await self._userdata(request, path.removeprefix("/userdata/"))
        if path in EMPTY:
            return web.json_response(EMPTY[path])
        file = self.frontend / (path.lstrip("/") or "index.html")
        if file.is_file():
            return web.FileResponse(file)
        return web.Response(status=204 if request.method == "POST" or path == "/user.css" else 404)

    async def _settings(self, request, name):
        if request.method == "POST":
            given = await request.json()
            self.settings.update({name: given} if name else given)
            return web.json_response({})
        return web.json_response(self.settings.get(name) if name else self.settings)

    async def _userdata(self, request, name):
        if request.method == "POST":
            self.userdata[name] = await request.read()
            return web.json_response({"path": name, "size": 1, "modified": 1, "created": 1})
        known = self.userdata.get(name)
        return web.Response(status=204) if known is None else web.Response(body=known)

    async def _socket(self, request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        client = request.query.get("clientId") or f"page{len(self._sockets)}"
        self._sockets[client] = socket
        await socket.send_json(
            {"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": client}}
        )
        async for message in socket:
            if message.type == WSMsgType.ERROR:
                break
        if self._sockets.get(client) is socket:
            del self._sockets[client]
        return socket
