"""The last message of the last runs, for a page that lost its connection or was reloaded meanwhile."""

ROUTE = "/fgattn/runs"
KEPT = 24  # runs, of all pages: 528 KB at most


class Recent:
    """The last message of each run, by the page that queued it."""

    def __init__(self):
        self._last: dict[tuple[str, str], dict] = {}  # (page, run) -> message, oldest run first

    def note(self, client: str, message: dict) -> None:
        self._last[client, message["run"]] = message
        if len(self._last) > KEPT:
            del self._last[next(iter(self._last))]

    def of(self, client: str | None) -> list[dict]:
        """A page's messages, oldest run first; other pages' runs may have nodes of the same ids."""
        return [message for (page, _), message in list(self._last.items()) if page == client]


RECENT = Recent()


def serve(server, recent: Recent = RECENT) -> None:
    """Add the route to ComfyUI's server."""
    from aiohttp import web

    @server.routes.get(ROUTE)
    async def runs(request):
        return web.json_response(recent.of(request.query.get("client")))
