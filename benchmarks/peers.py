"""Other attention kernels beside ours: one function each, which returns a run or says why there is none.

Dense ones are checked against float64, block-sparse ones against float64 with their own mask, and
`sol_attn`, which chooses its own blocks, against its own full-precision reference on one head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from .measure import relative_error, sampled_error
from .runner import Run
from .shapes import QKV

TOLERANCE = 5e-3  # relative L2; bf16 rounding of the weights and the output gives 2e-3
SOL_TOLERANCE = 0.1  # it computes in INT8
SOL_BLOCK = 64
WORKSPACE_BYTES = 512 << 20


def peer(name: str):
    """A peer that is not installed, or does not run here, becomes a row that says so."""

    def decorate(build: Callable[..., Run]):
        @functools.wraps(build)
        def guarded(*args, **kwargs) -> Run:
            try:
                return build(*args, **kwargs)
            except ImportError as error:
                return Run(name, missing=f"not installed: {error}")
            except Exception as error:
                return Run(
                    name,
                    missing=" ".join(f"withheld: does not run here: {type(error).__name__}: {error}".split())[
                        :160
                    ],
                )

        return guarded

    return decorate


def sdpa(qkv: QKV, backend: SDPBackend, name: str) -> Run:
    """PyTorch's dense attention."""

    def call():
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*qkv)

    return Run(name, call, lambda out: sampled_error(qkv, out, 128), TOLERANCE, {"density": 1.0})


def cudnn(qkv: QKV) -> Run:
    """The yardstick: the fastest dense attention that PyTorch has on Hopper."""
    return sdpa(qkv, SDPBackend.CUDNN_ATTENTION, "cudnn")


def flash(qkv: QKV) -> Run:
    return sdpa(qkv, SDPBackend.FLASH_ATTENTION, "sdpa flash")


@peer("flexattention")
def flex(qkv: QKV, mask: torch.Tensor, block: int) -> Run:
    """PyTorch's FlexAttention, compiled and autotuned, every kept block whole."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    counts, columns = listed(mask[None])
    blocks = BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(columns),
        counts,
        columns,
        BLOCK_SIZE=(block, block),
        seq_lengths=(qkv.q.shape[2], qkv.k.shape[2]),
    )
    compiled = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")
    return block_sparse("flexattention", qkv, mask, (block, block), lambda: compiled(*qkv, block_mask=blocks))


@peer("flashattention-4")
def fa4(qkv: QKV) -> Run:
    """FlashAttention-4 (CuTe), dense."""
    from flash_attn.cute import flash_attn_func

    q_, k_, v_ = (x.transpose(1, 2) for x in qkv)

    def call():
        return _only_output(flash_attn_func(q_, k_, v_)).transpose(1, 2)

    return Run(
        "flashattention-4", call, lambda out: sampled_error(qkv, out, 128), TOLERANCE, {"density": 1.0}
    )


@peer("flashattention-4")
def fa4_sparse(qkv: QKV, mask: torch.Tensor, rows: int, keys: int) -> Run:
    """FlashAttention-4 (CuTe), every kept block whole."""
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    counts, columns = listed(mask[None])
    blocks = BlockSparseTensorsTorch(
        torch.zeros_like(counts), torch.zeros_like(columns), counts, columns, block_size=(rows, keys)
    )
    q_, k_, v_ = (x.transpose(1, 2) for x in qkv)
    return block_sparse(
        "flashattention-4",
        qkv,
        mask,
        (rows, keys),
        lambda: _only_output(flash_attn_func(q_, k_, v_, block_sparse_tensors=blocks)).transpose(1, 2),
    )


@peer("flashinfer")
def flashinfer(qkv: QKV, mask: torch.Tensor, rows: int, keys: int) -> Run:
    """FlashInfer's variable-block kernel, with equal blocks; planned before it is timed."""
    from flashinfer import VariableBlockSparseAttentionWrapper

    q, k, v = qkv
    heads, length, dim = q.shape[1:]
    wrapper = VariableBlockSparseAttentionWrapper(
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    )

    def sizes(width: int) -> torch.Tensor:
        full = torch.full((heads, -(-length // width)), width, dtype=torch.int32, device=q.device)
        full[:, -1] = length - (full.shape[1] - 1) * width
        return full

    wrapper.plan(mask, sizes(rows), sizes(keys), heads, heads, dim, q_data_type=q.dtype)
    return block_sparse("flashinfer", qkv, mask, (rows, keys), lambda: wrapper.run(q[0], k[0], v[0])[None])


@peer("sol_attn")
def sol(qkv: QKV, tau: float, dense: torch.Tensor | None = None, tokens: torch.Tensor | None = None) -> Run:
    """comfy-kitchen's `sol_attn`, all stages.

    Args:
        dense: judge by the error against this output of dense attention, as for a real model; without it
            by its own reference on one head.
        tokens: order in which it gets the tokens (reordering them is not timed); None is as stored.
    """
    from comfy_kitchen import sol_attn

    q_, k_, v_ = (in_order(x, tokens).transpose(1, 2) for x in qkv)  # [B, L, H, D]

    def by_reference(out) -> float:
        from comfy_kitchen.backends.eager.sol_attn import sol_attn as reference

        return relative_error(out[:, :, :1], reference(*(x[:, :, :1] for x in (q_, k_, v_)), tau=tau))

    def by_dense(dense: torch.Tensor, out) -> float:
        return relative_error(out, in_order(dense, tokens).transpose(1, 2))

    judged = by_reference if dense is None else functools.partial(by_dense, dense)
    return Run(
        "sol_attn",
        lambda: sol_attn(q_, k_, v_, tau=tau),
        judged,
        SOL_TOLERANCE if dense is None else 1.0,
        {"M": SOL_BLOCK, "N": SOL_BLOCK, "threshold": tau, "density": float(sol_density(q_, k_, tau))},
    )


def sol_density(q, k, tau: float) -> torch.Tensor:
    """Share of block pairs that its published rule routes in the first batch row; q, k [B, L, H, D]."""
    queries, keys = (_block_means(x) for x in (q, k))
    keys = keys - keys.mean(1, keepdim=True)
    routed = queries @ keys.mT > tau * (queries.square() @ keys.square().mean(1)[..., None]).sqrt()
    near = torch.ones_like(routed[0]).triu(-1).tril(1)  # the diagonal and its neighbours
    return (routed | near).double().mean()


def _block_means(x: torch.Tensor) -> torch.Tensor:
    """[B, L, H, D] -> [H, blocks, D] of the first batch row."""
    rows = x[0].transpose(0, 1).float()
    short = -rows.shape[1] % SOL_BLOCK
    sums = pad(rows, (0, 0, 0, short)).unflatten(1, (-1, SOL_BLOCK)).sum(2)
    sizes = torch.full((sums.shape[1], 1), SOL_BLOCK, device=x.device)
    sizes[-1] -= short
    return sums / sizes


def block_sparse(name: str, qkv: QKV, mask: torch.Tensor, block: tuple[int, int], call) -> Run:
    """A run that executes a mask [H, tiles, slices] of blocks (queries, keys) exactly."""
    rows, keys = block
    queries, length = qkv.q.shape[2], qkv.k.shape[2]

    def kept(head: int, tile: int) -> torch.Tensor:
        return mask[head, tile].repeat_interleave(keys)[:length]

    widths = torch.full((mask.shape[2],), keys, device=mask.device)
    widths[-1] -= -length % keys
    heights = torch.full((mask.shape[1],), rows, device=mask.device)
    heights[-1] -= -queries % rows
    scores = torch.einsum("htk,t,k->", mask.double(), heights.double(), widths.double()).item()
    density = scores / (mask.shape[0] * queries * length)
    return Run(
        name,
        call,
        lambda out: sampled_error(qkv, out, rows, kept=kept),
        TOLERANCE,
        {"M": rows, "N": keys, "density": density},
    )


def listed(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number [..., tiles] and, packed to the left, places [..., tiles, slices] of what a mask keeps."""
    places = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return mask.sum(-1, dtype=torch.int32), places.to(torch.int32)


def in_order(x: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    return x if tokens is None else x[:, :, tokens]


def _only_output(result):
    return result[0] if isinstance(result, tuple) else result
