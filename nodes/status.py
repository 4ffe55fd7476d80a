"""Text on a node while the graph runs, without JavaScript."""

import logging

log = logging.getLogger("fgattn")


def show(node_id: str | None, text: str) -> None:
    """Show text on the node, and log it; there may be no server (tests, scripts)."""
    log.info("FG-Attn: %s", text)
    server = prompt_server()
    if node_id is not None and server is not None:
        server.send_progress_text(text, node_id)


def prompt_server():
    """ComfyUI's server, or None where there is none."""
    try:
        from server import PromptServer

        return PromptServer.instance
    except (ImportError, AttributeError):
        return None
