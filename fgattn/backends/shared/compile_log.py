"""Triton kernels; imported only where Triton is. A kernel that has to be compiled says so in the log."""

from __future__ import annotations

import logging

import triton

log = logging.getLogger("fgattn")


def announced(before):
    """A listener to Triton's compiler: logs kernels of ours that no cache held, then calls `before`."""

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
