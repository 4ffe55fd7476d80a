"""What differs between versions of Gluon, Triton's lower-level language, told apart by what is there.

Triton 3.7 renamed `thread_barrier`, 3.8 both functions `async_copy_global_to_shared`, 3.9 `_reinterpret`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma


def _either(module, name: str, older: str):
    return getattr(module, name) if hasattr(module, name) else getattr(module, older)


# Waits for all threads of the warps that run a function.
barrier = _either(gl, "barrier", "thread_barrier")
# cp.async: copy_rows(shared memory, pointers, mask); what is masked out becomes zero.
copy_rows = _either(async_copy, "async_load", "async_copy_global_to_shared")
# TMA: copy_box(tensor map, coordinates, barrier, shared memory).
copy_box = _either(tma, "async_load", "async_copy_global_to_shared")
_IS_PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def as_boxes(tiles, SHAPE: gl.constexpr, tensor_map):
    """The same shared memory with another shape, in the layout of a tensor map's boxes."""
    if _IS_PUBLIC:
        return tiles.reinterpret(tiles.dtype, SHAPE, tensor_map.layout)
    else:
        return tiles._reinterpret(tiles.dtype, SHAPE, tensor_map.layout)
