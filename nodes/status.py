"""Text on a node while the graph runs, without JavaScript. Nothing here raises, so no render is lost."""

import functools
import logging
from typing import Any

from ..fgattn.errors import one_line

log = logging.getLogger("fgattn")


def show(node_id: str | None, text: str) -> None:
    """Show text on the node, and log it; there may be no server (tests, scripts)."""
    log.info("FG-Attn: %s", text)
    tell(node_id, text)


def tell(node_id: str | None, text: str) -> None:
    """Show text on the node, in the page that queued the prompt; others have other nodes with its id."""
    server = prompt_server()
    client = page_of(server)
    if node_id is None or client is None:
        return
    try:
        server.send_progress_text(text, node_id, sid=client)
    except Exception as error:
        _cannot(one_line(error))


def prompt_server():
    """ComfyUI's server, or None where there is none."""
    try:
        from server import PromptServer

        return PromptServer.instance
    except Exception:
        return None


def page_of(server) -> str | None:
    """The page that queued the prompt, as a server knows it; None without a page."""
    try:
        page = server.client_id
    except Exception:
        return None
    return page if isinstance(page, str) else None


def own_id(node: Any) -> str | None:
    """The id that a node has in the graph; None where a script calls it."""
    return getattr(node.hidden, "unique_id", None)


@functools.lru_cache(maxsize=16)
def _cannot(why: str) -> None:
    """Once for each reason: a run says many things."""
    log.warning("FG-Attn cannot show text on its nodes: %s", why)
