"""Live sliders: the page posts values of a node that is sampling, its engine takes them at the next step."""

import contextlib
import json

from ..fgattn.errors import InvalidArgument, is_number, one_line
from ..fgattn.runs.engine import Engine
from .inputs import MOST_THRESHOLD, MOST_WARMUP
from .status import page_of, prompt_server

LONGEST = 4096  # bytes of a message
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
            for name, most in (("threshold", MOST_THRESHOLD), ("warmup_steps", MOST_WARMUP)):
                if is_number(message[name]) and message[name] > most:
                    raise InvalidArgument(name, message[name], f"at most {most:g}", "The slider ends there.")
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
            message = await read(request)
        except Exception as error:  # whatever is wrong with it, it is the sender's
            status, reason = 400, f"the message cannot be read: {one_line(error)}"
        else:
            status, reason = sliders.move(message)
        return web.json_response({"refused": reason} if reason else {}, status=status)


async def read(request) -> object:
    """The JSON of a request; raises an exception of any kind where there is none."""
    body = bytearray()
    async for part in request.content.iter_chunked(LONGEST):
        body += part
        if len(body) > LONGEST:
            raise ValueError(f"it has more than {LONGEST} bytes")
    return json.loads(body.decode(request.charset or "utf-8"))
