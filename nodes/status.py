"""Text on a node while the graph runs, without JavaScript."""

import logging

log = logging.getLogger("fgattn")


def show(node_id: str | None, text: str) -> None:
    """Show text on the node, and log it; there may be no server (tests, scripts)."""
    log.info("FG-Attn: %s", text)
    tell(node_id, text)


def tell(node_id: str | None, text: str) -> None:
    """Show text on the node, in the page that queued the prompt; others have other nodes with its id."""
    client = getattr(prompt_server(), "client_id", None)
    if node_id is not None and client is not None:
        prompt_server().send_progress_text(text, node_id, sid=client)


def prompt_server():
    """ComfyUI's server, or None where there is none."""
    try:
        from server import PromptServer

        return PromptServer.instance
    except (ImportError, AttributeError):
        return None
