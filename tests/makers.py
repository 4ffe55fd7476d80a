"""Inputs and yardsticks that several tests share."""

import dataclasses
import math
from collections import Counter

import torch
from fgattn import SparsePlan, TokenLayout, plan_from_mask, reference, sparse_attention
from fgattn.backends import registry
from fgattn.backends.base import Planned
from fgattn.backends.execute import plan_of
from fgattn.call import Call
from fgattn.layout import CELL
from fgattn.outcomes import Outcome, Reason
from fgattn.plan import of_heads
from fgattn.runs.reports import RunReport, RunSettings

# Of a usual run, for tests that are about something else.
CHOSEN = RunSettings("threshold", 1.0, 128, 16, "cells", True, 2, 8)
SHORT_OF_BOUND = 1e-4  # decisions closer to the threshold than this may differ
Accelerator = getattr(torch, "AcceleratorError", RuntimeError)  # torch 2.8 and newer
FULL = [  # a full memory, in the words of whoever finds it
    torch.cuda.OutOfMemoryError("no room"),
    Accelerator("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("level_zero backend failed with error: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"),
    MemoryError(),
]


def tensors(heads, queries, keys=None, dim=64, *, batch=1, dtype=torch.float32, seed=0):
    """q [B, H, L_q, D] and k, v [B, H, L_k, D] that attend unevenly.

    Stretches of a few tokens share a direction, queries and keys draw from the same directions.
    """
    keys = queries if keys is None else keys
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(batch, heads, *shape, dim, generator=generator)

    directions = noise(6)
    result = []
    for length, strength in ((queries, 1.5), (keys, 1.5), (keys, 0.5)):
        stretches = torch.randint(6, (length // 11 + 1,), generator=generator)
        rows = directions[:, :, stretches.repeat_interleave(11)[:length]]
        result.append((strength * rows + noise(length)).to(dtype))
    return tuple(result)


def by_text(report: RunReport) -> Counter:
    """A report's calls under the texts that people read."""
    calls = Counter()
    for reason, number in report.calls.items():
        calls[reason.text] += number
    return calls


def by_reason(**calls: int) -> dict[Reason, int]:
    """Calls as in a report, by the names of outcomes."""
    return {Reason(Outcome[name.upper()]): number for name, number in calls.items()}


def random_valid(batch, keys, seed=0):
    """bool [B, keys]: ends of different lengths and a few scattered keys are missing."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(batch, keys, generator=generator) > 0.1
    for row in range(batch):
        valid[row, keys - keys * (row + 1) // 5 :] = False
    return valid


def random_mask(*shape, share=0.4, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def mask_plan(m, n, length, *, heads=1, batch=1, share=0.4, seed=0, **options):
    """A plan from a random mask; the first tile keeps nothing, the last one keeps the last slice."""
    mask = random_mask(batch, heads, -(-length // m), -(-length // n), share=share, seed=seed)
    mask[:, :, -1, -1] = True
    mask[:, 0, 0] = False
    return plan_from_mask(mask, m, n, query_length=length, key_length=length, **options)


def poisoned(x, valid):
    """x [B, H, L, D] with NaN in the rows that do not exist."""
    return x.masked_fill(~valid[:, None, :, None], float("nan"))


def place(t, h, w):
    """The sort key of a video token as the definition states it."""
    brick = (t // 4, h // 4, w // 8)
    cell = (t % 4 // 2, h % 4 // 2, w % 8 // 4)
    inside = (t % 2, h % 2, w % 4)
    return brick, cell, inside


def restated_order(grid, front, back, order):
    """Token at each position: plain sorting of (place, token) pairs."""
    t_size, h_size, w_size = grid
    video = [
        (place(t, h, w), front + (t * h_size + h) * w_size + w)
        for t in range(t_size)
        for h in range(h_size)
        for w in range(w_size)
    ]
    if order == "cells":
        video.sort(key=lambda pair: pair[0])
    last = front + len(video)
    return [token for _, token in video] + list(range(front)) + list(range(last, last + back))


def query_tokens(plan: SparsePlan, batch: int, head: int):
    """Token of each query in a head's order of execution."""
    return of_heads(plan.query_tokens, batch, slice(head, head + 1))[0].long()


def executed_mask(plan: SparsePlan, batch: int, head: int):
    """bool [L_q, L_k]: the scores a plan computes, queries in the order of execution, keys in the order."""
    kept = plan.kept_keys(batch, slice(head, head + 1))[0]
    return kept.repeat_interleave(plan.tile_rows, 0)[: plan.queries]


def in_memory_order(mask, plan: SparsePlan, batch=0, head=0):
    """executed_mask of a head -> both sides as stored."""
    result = torch.empty_like(mask)
    result[query_tokens(plan, batch, head)[:, None], plan.geometry.key_tokens] = mask
    return result


def assert_lists_agree(plan: SparsePlan, values, m: int, most_undecided=None):
    """A plan's lists and counts against reference.select, but for decisions too close to call.

    Tiles are joined in the plan's own order, whose rule has tests of its own.
    """
    undecided = values.abs() < SHORT_OF_BOUND
    most_undecided = undecided.numel() // 100 if most_undecided is None else most_undecided
    assert undecided.sum() <= most_undecided, "the case decides nothing"
    group = max(1, plan.tile_rows // m)
    joined = values
    if plan.cell_order is not None:
        tile = plan.cell_order[..., :: m // CELL, None].long() // (m // CELL)
        joined = values.gather(2, tile.expand_as(values))
    padded = torch.nn.functional.pad(joined, (0, 0, 0, -values.shape[2] % group), value=-math.inf)
    union = padded.unflatten(2, (-1, group)).amax(3)
    got = torch.stack([plan.kept_slices(b, slice(None)) for b in range(len(values))])
    wrong = (got != (union >= 0)) & (union.abs() >= SHORT_OF_BOUND)
    assert not wrong.any(), f"[batch, head, tile, slice] {wrong.nonzero()[:5].tolist()} of {tuple(got.shape)}"
    for count, rows, kept, open_ in (
        (plan.requested, m, values >= 0, undecided),
        (plan.executed, plan.tile_rows, union >= 0, union.abs() < SHORT_OF_BOUND),
    ):
        low, high = _scores(plan, rows, kept & ~open_), _scores(plan, rows, kept | open_)
        assert (low <= count).all() and (count <= high).all()


def _scores(plan: SparsePlan, rows: int, kept):
    """Number of scores in kept [B, H, tiles, slices], [B, H]."""
    valid = torch.ones(len(kept), plan.keys) if plan.key_valid is None else plan.key_valid
    keys = torch.nn.functional.pad(valid.double(), (0, -plan.keys % plan.tile_keys))
    keys = keys.unflatten(1, (-1, plan.tile_keys)).sum(2)
    queries = torch.tensor([len(r) for r in torch.arange(plan.queries).split(rows)], dtype=torch.float64)
    return torch.einsum("bhts,t,bs->bh", kept.double(), queries, keys)


def low_precision(q, k, v, plan: SparsePlan):
    """Dense mask and tail computed in the tensors' own type throughout: the error of rounding alone."""
    out = torch.zeros_like(q)
    scale = plan.softmax_scale(q.shape[3])
    for b in range(q.shape[0]):
        valid = plan.valid_keys(b)
        valid = torch.ones(plan.keys, dtype=torch.bool) if valid is None else valid.cpu()
        for h in range(q.shape[1]):
            tokens = query_tokens(plan, b, h)
            rows = q[b, h, tokens]
            keys, values = (
                x[b, h, plan.geometry.key_tokens].masked_fill(~valid.to(x.device)[:, None], 0) for x in (k, v)
            )
            mask = executed_mask(plan, b, h)
            scores = (rows @ keys.T * scale).masked_fill(~mask, -math.inf)
            if plan.tail:
                query_runs = [r.mean(0) for r in rows.split(CELL)]
                cells = list(zip(*(x.split(CELL) for x in (keys, values, valid)), strict=True))
                key_means, value_means = (
                    torch.stack([c[i].sum(0) / max(1, int(c[2].sum())) for c in cells]) for i in (0, 1)
                )
                left = torch.stack(
                    [
                        c.sum() - m.sum(1).cpu()
                        for c, m in zip(valid.split(CELL), mask.split(CELL, 1), strict=True)
                    ],
                    1,
                )
                pooled = (torch.stack(query_runs) @ key_means.T * scale).repeat_interleave(CELL, 0)
                pooled = pooled[: len(rows)] + left.to(rows).log()
                scores, values = torch.cat((scores, pooled), 1), torch.cat((values, value_means))
            weights = scores.softmax(1).masked_fill((scores == -math.inf).all(1, keepdim=True), 0)
            out[b, h, tokens] = weights @ values
    return out


def assert_error_of_rounding(got, q, k, v, plan: SparsePlan):
    """|got - exact| <= 2 (|low precision - exact| + eps max), with the same lists in float64."""
    exact = reference.attend(q.double(), k.double(), v.double(), plan)
    rounding = (low_precision(q, k, v, plan).double() - exact).abs().max().item()
    allowed = 2 * (rounding + torch.finfo(q.dtype).eps * exact.abs().max().item())
    error = (got.double() - exact).abs().max().item()
    assert error <= allowed, f"error {error:.2e}, rounding explains {allowed:.2e}"


def without_tail(plan: SparsePlan) -> SparsePlan:
    return dataclasses.replace(plan, tail=False)


@dataclasses.dataclass(frozen=True)
class Case:
    """A sequence with a reason to be tested."""

    why: str
    grid: tuple[int, int, int]
    front: int = 0
    back: int = 0
    start: int | None = 0  # layout.query_start
    queries: int | None = None  # None: all tokens from `start` on
    padded: bool = False  # some keys do not exist
    batch: int = 1
    heads: int = 2

    @property
    def keys(self) -> int:
        return TokenLayout(self.grid, self.front, self.back).length

    @property
    def query_count(self) -> int:
        return self.keys - (self.start or 0) if self.queries is None else self.queries

    def layout(self) -> TokenLayout:
        valid = random_valid(self.batch, self.keys) if self.padded else None
        return TokenLayout(self.grid, self.front, self.back, self.start, valid)

    def tensors(self, dim=64, dtype=torch.float32, seed=0):
        q, k, v = tensors(
            self.heads, self.query_count, self.keys, dim, batch=self.batch, dtype=dtype, seed=seed
        )
        if self.padded:
            k, v = (poisoned(x, random_valid(self.batch, self.keys)) for x in (k, v))
        return q, k, v


CASES = {
    c.why: c
    for c in (
        Case("bricks divide the grid", (4, 8, 8)),
        Case("ragged grid", (3, 9, 13), batch=2),
        Case("sinks on both sides", (3, 6, 9), front=5, back=20),
        Case("short sinks share a cell with video", (2, 5, 13), back=3),
        Case("keys are missing", (3, 7, 10), front=3, back=9, padded=True, batch=2),
        Case("queries are the end of the keys", (4, 6, 8), front=7, start=100),
        Case("queries are the middle of the keys", (4, 6, 8), back=10, start=37, queries=90),
        Case("cross-attention", (3, 6, 8), back=5, start=None, queries=75, padded=True),
        Case("one token", (1, 1, 1)),
        Case("fewer tokens than a cell", (1, 3, 4), front=1),
        Case("sinks only", (0, 0, 0), back=40),
    )
}


def tail_of(q, k, v, plan, impl="torch", made=None):
    """The tail of a plan by a backend, (out, log-sum-exp); made: what the plan's own backend hands on."""
    call = Call.under(plan, q, k, v)
    return registry.by_name(impl).tail(call, Planned(plan, made))


def planned(q, k, v, settings, layout, impl="triton", scale=None):
    """A call, its backend and what that one plans: a plan, and what serves the tail of the same call."""
    call, backend = Call.to_plan(q, k, v, settings, layout, scale), registry.by_name(impl)
    return call, backend, plan_of(call, backend)


def assert_finite_where_dense_is(
    impl, value, side, settings, layout, *, device="cpu", dtype=torch.float32, dim=64
):
    """An element of q (side 0) or k (1) that is not finite costs the rows that it costs dense attention."""
    qkv = [x.to(device, dtype) for x in tensors(2, layout.length, dim=dim)]
    clean = sparse_attention(*qkv, settings, layout, impl=impl)
    qkv[side][0, 0, 40, 3] = value
    got = sparse_attention(*qkv, settings, layout, impl=impl).isfinite().all(3)
    dense = torch.softmax(qkv[0].double() @ qkv[1].double().mT * dim**-0.5, 3) @ qkv[2].double()
    expected = dense.isfinite().all(3)
    assert clean.isfinite().all() and expected[0, 1].all() and not expected.all()
    assert (got == expected).all() if side == 0 else got[expected].all()
