"""Marks in time on a device, and the time between them."""

from __future__ import annotations

import time

import torch


class Clock:
    """Marks in time on one device: CUDA events, or the host's clock elsewhere."""

    def __init__(self, device: torch.device):
        self.device = device

    def mark(self) -> torch.cuda.Event | float:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device.index))  # a number is the fastest to look up
        return event

    def passed(self, mark) -> bool:
        """Whether the device has reached a mark; never waits."""
        return isinstance(mark, float) or mark.query()

    def milliseconds(self, start, end) -> float:
        """Time between two marks; waits for the later one."""
        if isinstance(start, float):
            return (end - start) * 1e3
        end.synchronize()
        return start.elapsed_time(end)
