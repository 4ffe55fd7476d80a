"""Tells the page that queued a run what it is doing: statistics for the panel, a line of text for the node.

Nothing depends on it; without a page it is idle.
"""

import logging
import time
from collections.abc import Callable

from ..fgattn.runs.reports import RunReport
from ..fgattn.show.snapshot import State, snapshot
from .recent import RECENT
from .status import page_of, prompt_server, tell

log = logging.getLogger("fgattn")
EVENT = "fgattn.progress"
INTERVAL = 0.25  # s between updates: with the one at the end, at most 5 in a second
COST_SHARE = 0.01  # of the run's time may go into updates


class Live:
    """Live statistics of one FG-Attn node.

    Args:
        node_id: of the node; None sends nothing.
        so_far: reads the run that is going on, without waiting for the device.
    """

    def __init__(self, node_id: str | None, so_far: Callable[[], RunReport | None]):
        self._node_id, self._so_far = node_id, so_far
        self._run = ""
        self._due = 0.0  # when the next update may go
        self._broken = False

    def begin(self) -> None:
        """A run starts."""
        self._run, self._broken = f"{time.time_ns():x}", False
        self.update()

    def update(self) -> None:
        """Send an update, if it is time for one."""
        start = time.perf_counter()
        if start >= self._due:
            self._send(self._so_far, "running")
            now = time.perf_counter()
            self._due = now + max(INTERVAL, (now - start) / COST_SHARE)

    def end(self, report: RunReport, state: State) -> None:
        """The run is over; this update always goes."""
        self._send(lambda: report, state)
        self._due = time.perf_counter() + INTERVAL

    def _send(self, read: Callable[[], RunReport | None], state: State) -> None:
        """Send a snapshot to the client of the running prompt; a failure is logged, and ends the updates."""
        try:
            server = prompt_server()
            client = page_of(server)
            if self._node_id is None or client is None or self._broken:
                return
            if report := read():
                message = snapshot(report, self._node_id, self._run, state)
                RECENT.note(client, message)
                server.send_sync(EVENT, message, client)
                if message["step"] and state == "running":
                    tell(
                        self._node_id, f"{message['headline']}, step {message['step']} of {message['steps']}"
                    )
        except Exception:
            self._broken = True
            log.exception("FG-Attn could not send live statistics; the run goes on without them")
