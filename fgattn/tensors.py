"""Which tensors are accepted, and reading their rows in the order, a few heads at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import pad

from .cache import makes_real_tensors
from .errors import InvalidArgument, check_type

CHUNK_ELEMENTS = 16 << 20  # size of the largest temporary while a chunk of heads is processed
GRADIENTS = "gradients are wanted, and sparse attention has no backward pass"
NO_VALUES = "values that are not in memory, as on the meta device and under FakeTensorMode"
UNALIGNED = "rows that are not 16-byte aligned"
FULL = (  # what a RuntimeError says where memory is full, in lower case and without underscores
    "out of memory",  # PyTorch's allocators, CUDA, HIP and Triton
    "out of device memory",  # Level Zero
    "alloc failed",  # cuBLAS, cuDNN
    "allocate memory",  # the host's allocator, on Linux and macOS
    "not enough memory",  # the same, on Windows
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of whatever type, says that memory is full: less at a time may fit."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower().replace("_", " ")
    return isinstance(error, RuntimeError) and any(sign in text for sign in FULL)


def declined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why valid attention inputs [B, H, L, D] cannot run here, or None."""
    if q.shape[1] != k.shape[1]:
        return f"grouped heads ({q.shape[1]} query heads, {k.shape[1]} key heads)"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return GRADIENTS
    is_real = makes_real_tensors()
    for name, x in (("q", q), ("k", k), ("v", v)):
        reason = _misplaced(x.shape, x.stride(), x.element_size())
        if x.numel() and not (is_real and x.data_ptr()):
            reason = NO_VALUES
        if reason is None and x.data_ptr() % 16:
            reason = UNALIGNED
        if reason:
            return f"{name} has {reason}"
    return None


@functools.lru_cache(maxsize=64)
def _misplaced(shape: tuple[int, ...], strides: tuple[int, ...], element_size: int) -> str | None:
    """What is wrong with how a tensor [B, H, L, D] is stored, or None."""
    if 0 in shape:
        return None
    if strides[3] != 1:
        return f"stride {strides[3]} in its last dimension, not 1"
    between = (stride for stride, n in zip(strides[:3], shape, strict=False) if n > 1)
    return UNALIGNED if any(stride * element_size % 16 for stride in between) else None


def unwritable(out: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> str | None:
    """Why kernels cannot write to out [B, H, L, D] while they read the inputs, or None."""
    if reason := _misplaced(out.shape, out.stride(), out.element_size()):
        return reason
    if torch.is_grad_enabled() and out.requires_grad:
        return "elements that require gradients"
    if any(stride == 0 and n > 1 for stride, n in zip(out.stride(), out.shape, strict=True)):
        return "elements that share memory"
    memory = out.untyped_storage().data_ptr()  # 0 where nothing is stored
    if memory and any(memory == x.untyped_storage().data_ptr() for x in inputs):
        return "the memory of an input"
    return None


def check_tensor(name: str, x: Any, remedy: str) -> None:
    """Raise InvalidArgument unless this is a tensor that is neither sparse nor nested."""
    check_type(name, x, torch.Tensor, remedy)
    if x.is_nested or x.layout is not torch.strided:
        kind = "a nested tensor" if x.is_nested else str(x.layout)
        raise InvalidArgument(
            name, kind, "a dense tensor", "Convert it with to_dense() or to_padded_tensor()."
        )


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise InvalidArgument unless q, k, v are attention inputs [B, H, L, D]; `declined` asks for more."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, "Pass tensors [B, H, L, D].")
    queries, keys = q.shape, k.shape
    if not (
        len(queries) == len(keys) == 4 and queries[0] == keys[0] and queries[3] == keys[3] and keys == v.shape
    ):
        raise InvalidArgument(
            "shapes of q, k, v",
            tuple(tuple(x.shape) for x in (q, k, v)),
            "[B, H, L_q, D] and twice [B, H, L_k, D]",
            "Split fused heads first.",
        )
    if not queries[3]:
        raise InvalidArgument("D, the head size", 0, "at least 1", "Split heads into channels first.")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device and q.dtype in DTYPES):
        kinds = {(x.dtype, x.device) for x in (q, k, v)}
        raise InvalidArgument(
            "dtype and device of q, k, v",
            sorted(map(str, kinds)),
            "one of fp16, bf16, fp32, float64 on one device",
            "Convert them first.",
        )


def compute_type(x: torch.Tensor) -> torch.dtype:
    """The type products are computed in: bf16 for fp32 on a GPU, else the tensor's own."""
    return torch.bfloat16 if x.is_cuda and x.dtype == torch.float32 else x.dtype


def head_chunks(batch: int, heads: int, elements: int) -> Iterator[tuple[int, slice]]:
    """(batch row, heads) pairs, with as many heads as fit at `elements` each."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements))
    for b in range(batch):
        for h in range(0, heads, step):
            yield b, slice(h, min(h + step, heads))


def ordered(x: torch.Tensor, batch: int, heads: slice, tokens: torch.Tensor) -> torch.Tensor:
    """Rows of [B, H, L, D] in an order, [L] or [G or 1, L], that is [G, L, D] in the compute type."""
    x = x[batch, heads]
    if tokens.ndim == 2 and len(tokens) > 1:
        return x.gather(1, tokens[..., None].long().expand(-1, -1, x.shape[2])).to(compute_type(x))
    return x.index_select(1, tokens.flatten()).to(compute_type(x))


def any_of(kept: torch.Tensor, width: int) -> torch.Tensor:
    """[..., n] -> [..., ceil(n / width)]: whether any of `width` neighbours is set."""
    if width == 1:
        return kept
    return pad(kept, (0, -kept.shape[-1] % width)).unflatten(-1, (-1, width)).any(-1)


def empty_like(q: torch.Tensor) -> torch.Tensor:
    """An output for q that is stored as q is: [B, H, L, D] or [B, L, H, D]."""
    if q.stride(1) < q.stride(2):
        return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    return torch.empty_like(q, memory_format=torch.contiguous_format)
