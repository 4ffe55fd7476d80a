"""The attention kernel alone, on random masks: rate against dense cuDNN at every M and N.

rate = 4 L^2 D H * density / time, so that 1.0 of the dense rate means that nothing is lost to the
fine grain. Each row is checked against float64 on sampled query tiles.
"""

from __future__ import annotations

import functools

import torch
from fgattn import attend, plan_from_mask, runtime
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .measure import milliseconds, relative_error

TOLERANCE = 5e-3  # relative L2; bf16 rounding of the weights and the output gives 2e-3


def random_mask(heads: int, tiles: int, slices: int, density: float) -> torch.Tensor:
    """Exactly the same number of random slices in every tile."""
    scores = torch.rand(heads, tiles, slices, device="cuda")
    return scores <= scores.kthvalue(max(1, round(density * slices)), dim=2, keepdim=True).values


def sampled_error(q, k, v, out, mask, m: int, n: int) -> float:
    """Relative error of a few query tiles against float64 with a dense mask."""
    errors = []
    for head, tile in ((0, 0), (q.shape[1] - 1, mask.shape[1] - 1), (q.shape[1] // 2, mask.shape[1] // 2)):
        rows = slice(tile * m, min((tile + 1) * m, q.shape[2]))
        keep = mask[head, tile].repeat_interleave(n)[: k.shape[2]]
        scores = q[0, head, rows].double() @ k[0, head, keep].double().T * q.shape[3] ** -0.5
        errors.append(relative_error(out[0, head, rows], scores.softmax(1) @ v[0, head, keep].double()))
    return max(errors)


def rows(length: int = 32760, heads: int = 12, density: float = 0.3, quick: bool = False):
    """One row per (D, M, N) and kernel that this machine's GPU runs; lists are made in the timed call."""
    impls = ["triton"] if runtime.hopper_reason(torch.device("cuda")) else ["hopper", "triton"]
    result = []
    for dim in (128, 64):
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 1, heads, length, dim, device="cuda", dtype=torch.bfloat16).unbind()

        def dense(q=q, k=k, v=v):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q, k, v)

        for m in (128, 64):
            for n in (1, 16, 64) if quick else (1, 2, 4, 8, 16, 32, 64, 128):
                mask = random_mask(heads, -(-length // m), -(-length // n), density)
                plan = plan_from_mask(mask, m, n, query_length=length, key_length=length)

                runs = [functools.partial(attend, q, k, v, plan, impl=impl) for impl in impls]
                errors = [sampled_error(q, k, v, run(), mask, m, n) for run in runs]
                if not max(errors) < TOLERANCE:
                    raise SystemExit(f"D={dim} M={m} N={n}: relative errors {errors}, no rate is reported")
                *ours, cudnn = milliseconds(*runs, dense, repeats=10)
                flop = 4 * length**2 * dim * heads
                for impl, error, taken in zip(impls, errors, ours, strict=True):
                    rate = flop * float(plan.density) / taken["ms"] / 1e9
                    result.append({
                        "kernel": impl, "D": dim, "M": m, "N": n, "L": length, "heads": heads,
                        "density": float(plan.density), **taken, "tflops": rate,
                        "cudnn_dense_ms": cudnn["ms"], "ratio_to_cudnn": rate / (flop / cudnn["ms"] / 1e9),
                        "relative_error": error})
    return result
