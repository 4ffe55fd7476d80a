"""Runs every kernel on small shapes, for NVIDIA's compute-sanitizer: make sanitize.

    python -m tests.gpu.sanitize [triton | hopper]

Ragged ends, sinks, empty tiles, invalid keys, both head sizes and every unit of the lists. Exits with 1 if a
result is wrong, and with 2 if a kernel cannot run here.
"""

import itertools
import sys

import torch
from fgattn import Settings, TokenLayout, attend, build_plan, plan_from_mask
from fgattn.backends import registry
from fgattn.call import Call
from fgattn.outcomes import Reason

CASES = [  # M, N: every unit and every way to share a tile
    (128, 16),
    (128, 1),
    (64, 2),
    (64, 64),
    (32, 4),
    (16, 8),
    (16, 128),
]
LAYOUT = TokenLayout((3, 7, 13), front=5, back=9)  # 287 tokens: no tile, slice or cell ends with them


def plans(q, k, m, n):
    """A plan from scores with the tail, one from a mask without, and one with keys that do not exist."""
    yield build_plan(q, k, Settings(threshold=1.3, tile_queries=m, tile_keys=n), LAYOUT, impl="triton")
    mask = torch.rand(q.shape[1], -(-LAYOUT.length // m), -(-LAYOUT.length // n), device=q.device) < 0.3
    mask[0, 0], mask[-1, -1] = False, True
    yield plan_from_mask(mask, m, n, query_length=LAYOUT.length, key_length=LAYOUT.length)
    valid = torch.rand(q.shape[0], LAYOUT.length, device=q.device) > 0.2
    yield build_plan(
        q,
        k,
        Settings(threshold=1.3, tile_queries=m, tile_keys=n),
        TokenLayout(LAYOUT.grid, LAYOUT.front, LAYOUT.back, key_valid=valid),
        impl="triton",
    )


def main(impls: list[str]) -> int:
    device = torch.device("cuda")
    for impl in impls:
        q = torch.zeros(1, 1, 16, 64, device=device, dtype=torch.bfloat16)
        answer = registry.named(Call.to_plan(q, q, q, Settings(), TokenLayout.flat(16)), impl)
        if isinstance(answer, Reason):
            print(f"{impl} cannot run here: {answer.text}")
            return 2
    torch.manual_seed(0)
    worst, calls = 0.0, 0
    for dim, (m, n) in itertools.product((64, 128), CASES):
        shape = 2, 2, LAYOUT.length, dim
        # One allocation each: past the end of one must not lie another.
        q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
        for plan in plans(q, k, m, n):
            expected = attend(q, k, v, plan, impl="torch").float()
            for impl in impls:
                error = (attend(q, k, v, plan, impl=impl).float() - expected).norm() / expected.norm()
                worst, calls = max(worst, error.item()), calls + 1
        print(f"D={dim}, {m}x{n}: done", flush=True)
    print(f"{' and '.join(impls)}: {calls} calls, largest relative error {worst:.1e}")
    return 0 if worst < 1e-2 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["triton", "hopper"]))
