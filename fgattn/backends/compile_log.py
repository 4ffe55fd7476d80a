"""Says in the log when Triton compiles kernels of ours, which takes seconds: users would think it hangs."""

from __future__ import annotations

import importlib.util
import logging
import threading

log = logging.getLogger("fgattn")
_lock = threading.Lock()
_open = 0  # runs that are listened to
_ours = _before = None  # the listener while a run is open, and the one that it found


def start() -> None:
    """Listen to Triton's compiler until `stop`; nothing where Triton is missing or cannot tell."""
    global _open, _ours, _before
    with _lock:
        _open += 1
        compilation = _compilation()
        if _open == 1 and compilation is not None:
            _before = compilation.listener
            _ours = compilation.listener = announced(_before)


def stop() -> None:
    """The end of what `start` began; the last one gives Triton back the listener that was there."""
    global _open, _ours, _before
    with _lock:
        _open -= 1
        compilation = _compilation()
        if not _open and compilation is not None and compilation.listener is _ours:
            compilation.listener = _before
        if not _open:
            _ours = _before = None


def announced(before):
    """A listener: logs kernels of ours that no cache held, then calls `before`, the listener it replaces."""

    def listener(**event):
        module = getattr(getattr(event.get("src"), "fn", None), "__module__", None) or ""
        if not event.get("cache_hit") and module.startswith(f"{__package__}."):
            log.info("FG-Attn is compiling kernels, once: %s", event["src"].name)
        if before is not None:
            before(**event)

    return listener


def _compilation():
    """Triton's settings of the compiler, if it has them and a listener among them."""
    if not importlib.util.find_spec("triton"):
        return None
    try:
        import triton
    except Exception:  # it does not load: `shared.available` gives the reason
        return None
    compilation = getattr(getattr(triton, "knobs", None), "compilation", None)
    return compilation if hasattr(compilation, "listener") else None
