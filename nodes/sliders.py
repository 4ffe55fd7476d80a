"""Live sliders: the page posts values of a node that is sampling, its engine takes them at the next step."""

import contextlib

from ..fgattn.errors import InvalidArgument
from ..fgattn.runs.engine import Engine
from .status import page_of, prompt_server

ROUTE = "/fgattn/sliders"
FIELDS = {"client", "node", "threshold", "warmup_steps"}
NOT_RUNNING = "no such node of this page is sampling with live sliders"


class Sliders:
    """The nodes that sample with their live switch on, each for the page that queued it."""

    def __init__(self):
        self._running: dict[tuple[str, str], Engine] = {}

    @contextlib.contextmanager
    def during(self, node_id: str | None, engine: Engine):
        """While a node samples; without a page nobody can move its sliders."""
        page = page_of(prompt_server())
        if page is None or node_id is None:
            yield
            return
        self._running[page, node_id] = engine
        try:
            yield
        finally:
            self._running.pop((page, node_id), None)

    def move(self, message: object) -> tuple[int, str]:
        """Take a message of a page.

        Returns:
            HTTP status and why it was refused, or "".
        """
        if not isinstance(message, dict) or message.keys() != FIELDS:
            return 400, f"the fields must be {', '.join(sorted(FIELDS))}"
        engine = self._running.get((str(message["client"]), str(message["node"])))
        if engine is None:
            return 404, NOT_RUNNING
        try:
            taken = engine.move(message["threshold"], message["warmup_steps"])
        except InvalidArgument as error:
            return 400, str(error)
        return (200, "") if taken else (404, NOT_RUNNING)


SLIDERS = Sliders()


def serve(server, sliders: Sliders = SLIDERS) -> None:
    """Add the route to ComfyUI's server."""
    from aiohttp import web

    @server.routes.post(ROUTE)
    async def move(request):
        try:
            message = await request.json()
        except ValueError:
            message = None
        status, reason = sliders.move(message)
        return web.json_response({"refused": reason} if reason else {}, status=status)
