"""One attention call as ComfyUI makes it, and how ComfyUI would have computed it without us."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import comfy.ldm.modules.attention as core
import torch
from einops import rearrange

# Newer releases let a layer prefer an attention of its own (`ComfyAttention`) and may hand over q, k and v in
# containers. Their `wrap_attn` keeps both the preference and, with containers, the backend from an override.
HAS_PREFERENCES = hasattr(core, "ComfyAttention")
ASKING = core.wrap_attn(lambda: None).__code__  # of all its wrappers, whatever other packs do to these


class AttentionCall:
    """One call on its way. Refers to q, k and v by what ComfyUI gave alone, so that they can be freed early.

    Args:
        func: ComfyUI's backend, which takes tensors; None where q, k and v are in containers.
        inputs: q, k, v, each a tensor or in a container of ComfyUI, which gives its tensor away when taken.
        heads, mask, attn_precision, skip_reshape, skip_output_reshape, others: as ComfyUI calls them. q, k,
            v are [B, L, H*D], or [B, H, L, D] with skip_reshape; the output likewise.
    """

    def __init__(
        self,
        func: Callable | None,
        inputs: tuple[Any, Any, Any],
        heads: int,
        mask=None,
        attn_precision=None,
        skip_reshape=False,
        skip_output_reshape=False,
        **others,
    ):
        self.func, self.inputs, self.heads = func, inputs, heads
        self.contained = hasattr(inputs[0], "peek")
        self.options = others | {
            "mask": mask,
            "attn_precision": attn_precision,
            "skip_reshape": skip_reshape,
            "skip_output_reshape": skip_output_reshape,
        }

    @property
    def transformer_options(self) -> dict:
        return self.options.get("transformer_options") or {}

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Batch rows, queries, keys."""
        q, k, _ = self._tensors()
        tokens = 2 if self.options["skip_reshape"] else 1
        return len(q), q.shape[tokens], k.shape[tokens]

    def tensors_by_head(self) -> tuple[torch.Tensor, ...]:
        """q, k, v [B, H, L, D]."""
        tensors = self._tensors()
        if self.options["skip_reshape"]:
            return tensors
        size = tensors[0].shape[2] // self.heads  # k and v may have fewer heads than q
        return tuple(rearrange(x, "b l (h d) -> b h l d", d=size) for x in tensors)

    def dense_by_head(self, previous: Callable | None) -> torch.Tensor:
        """As `dense`, [B, H, L, D]."""
        out = self.dense(previous)
        if self.options["skip_output_reshape"]:
            return out
        return rearrange(out, "b l (h d) -> b h l d", h=self.heads)

    def as_asked(self, out: torch.Tensor) -> torch.Tensor:
        """An output [B, H, L, D] as ComfyUI wants it."""
        return out if self.options["skip_output_reshape"] else rearrange(out, "b h l d -> b l (h d)")

    def let_go(self) -> None:
        """The call is computed: its containers are empty from now on."""
        if self.contained:
            for container in self.inputs:
                container.tensor = None

    def dense(self, previous: Callable | None) -> torch.Tensor:
        """Compute the call as ComfyUI would have done.

        Args:
            previous: the override that was there before ours, if any; it decides, as it did then.
        """
        if previous is None:
            inside = {**self.options, "_inside_attn_wrapper": True}  # so that no override is asked again
            return self._own_attention()(*self.inputs, self.heads, **inside)
        if not self.contained:
            return previous(self.func, *self.inputs, self.heads, **self.options)
        if function := getattr(previous, "container_function", None):
            return function(*self.inputs, self.heads, **self.options)
        backend = _asking().get("func", core.optimized_attention)
        return previous(backend, *(x.take() for x in self.inputs), self.heads, **self.options)

    def _own_attention(self) -> Callable:
        """What the layer prefers, else ComfyUI's backend; with containers, the one that takes them."""
        if self.func is not None and not HAS_PREFERENCES:
            return self.func
        asking = _asking()
        preferred = getattr(asking.get("preferred_attention"), "function", None)
        chosen = self.func not in (None, asking.get("func"))  # by an override above ours
        if preferred is not None and not chosen:
            return preferred
        return self.func or asking.get("wrapper", core.optimized_attention)

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(x.peek() for x in self.inputs) if self.contained else self.inputs


def _asking() -> dict[str, Any]:
    """Names and values of the `wrap_attn` wrapper that asked for the override; none where it is not found.

    There is no other way to see what it leaves out. The names are those of its source; a release that has
    others gets its global backend.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not ASKING:
        frame = frame.f_back
    return frame.f_locals if frame else {}
