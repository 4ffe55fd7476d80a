"""Says in the log when a kernel of ours has to be compiled: the first call that needs it takes seconds more.

Triton calls one listener after each compilation or look-up in its cache. Importing this module puts ours in
front of the listener that was there, if this version of Triton has listeners.
"""

from __future__ import annotations

import logging

import triton

log = logging.getLogger("fgattn")


def announced(before):
    """A listener that logs each kernel of ours that no cache held, and then calls `before`, if any."""

    def listener(**event):
        module = getattr(getattr(event.get("src"), "fn", None), "__module__", None) or ""
        if not event.get("cache_hit") and module.startswith(f"{__name__.rpartition('.backends.')[0]}."):
            log.info("FG-Attn is compiling kernels, once: %s", event["src"].name)
        if before is not None:
            before(**event)

    return listener


if hasattr(getattr(getattr(triton, "knobs", None), "compilation", None), "listener"):
    triton.knobs.compilation.listener = announced(triton.knobs.compilation.listener)
else:
    log.info("FG-Attn compiles kernels at first use, once; this version of Triton cannot tell when")
