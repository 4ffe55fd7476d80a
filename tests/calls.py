"""Planning calls that tests draw at random: ragged grids, sinks, missing keys, bad values and the like."""

import dataclasses
import math

import torch
from fgattn import Settings, TokenLayout
from fgattn.settings import TILE_KEYS, TILE_QUERIES
from hypothesis import strategies as st
from makers import assert_lists_agree, poisoned
from makers import tensors as make

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ODD = (
    "equal keys",
    "zero queries",
    "huge key",
    "huge query",
    "NaN key",
    "NaN query",
    "inf key",
    "-inf key",
    "inf query",
    "huge everywhere",
)


@dataclasses.dataclass(frozen=True)
class PlanCall:
    """q, k and layout are made from it; its text says all there is to know about a failure."""

    settings: Settings
    grid: tuple[int, int, int]
    front: int
    back: int
    start: int | None
    queries: int
    missing: str
    batch: int
    heads: int
    dtype: str
    scale: float | None
    odd: str | None
    seed: int

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.grid, self.front, self.back, self.start, self.valid)

    @property
    def keys(self) -> int:
        return TokenLayout(self.grid, self.front, self.back).length

    @property
    def valid(self) -> torch.Tensor | None:
        if self.missing == "none":
            return None
        share = {"some": 0.8, "most": 0.1, "all": 0.0}[self.missing]
        return torch.rand(self.batch, self.keys, generator=self._random) < share

    @property
    def _random(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k [B, H, L, 64]; keys that do not exist are NaN."""
        q, k, _ = make(
            self.heads, self.queries, self.keys, batch=self.batch, dtype=DTYPES[self.dtype], seed=self.seed
        )
        if q.numel() and k.numel():
            self._spoil(q, k)
        return q, k if self.missing == "none" else poisoned(k, self.valid)

    def _spoil(self, q, k):
        """The last head shows what is odd; the others stay as they are."""
        q, k = q[0, -1], k[0, -1]
        row = int(torch.randint(2**30, (), generator=self._random))
        one_query, one_key = q[row % len(q)], k[row % len(k)]
        if self.odd == "equal keys":
            k[:] = k[0].clone()
        elif self.odd == "zero queries":
            q.zero_()
        elif self.odd == "huge everywhere":  # logits of hundreds
            q *= 16
        elif self.odd == "huge key":
            one_key.fill_(3e4)
        elif self.odd == "huge query":
            one_query.fill_(-3e4)
        elif self.odd:
            value, side = self.odd.split()
            (one_key if side == "key" else one_query)[row % 64] = float(value)

    def check(self, plan, reference):
        """The lists of a plan are those of the specification, element for element."""
        q, k = self.tensors()
        values = reference.select(q, k, self.settings, self.layout, self.scale)
        m, undecided = self.settings.tile_queries, max(3, values.numel() // 20)
        assert_lists_agree(plan, values, m, most_undecided=undecided)


# c^2 is infinite in fp16, and so are the log-sum-exp and the bound: by definition no key reaches it.
INFINITE_BOUND = PlanCall(
    Settings(threshold=0.5, tile_queries=16, tile_keys=1),
    (2, 1, 6),
    0,
    0,
    None,
    2,
    "none",
    2,
    1,
    "fp16",
    None,
    "huge query",
    0,
)


@st.composite
def plan_calls(draw, largest=(4, 7, 13), most_sinks=20, dtypes=tuple(DTYPES)) -> PlanCall:
    """Any planning call up to a size."""
    grid = tuple(draw(st.integers(1, side)) for side in largest)
    sinks = st.sampled_from((0, 0, 1, most_sinks // 2, most_sinks))
    front, back = draw(sinks), draw(sinks)
    keys = math.prod(grid) + front + back
    where = draw(st.sampled_from(("all", "all", "all", "part", "foreign", "foreign", "nothing")))
    start, queries = {"all": (0, keys), "nothing": (0, 0)}.get(where, (None, draw(st.integers(0, 300))))
    if where == "part":
        start = draw(st.integers(0, keys - 1))
        queries = draw(st.integers(1, keys - start))
    settings = Settings(
        threshold=draw(st.sampled_from((0.0, 0.5, 0.9, 1.3, 2.0, 4.0, 1.0, 1e6))),
        tile_queries=draw(st.sampled_from(TILE_QUERIES)),
        tile_keys=draw(st.sampled_from(TILE_KEYS)),
        order=draw(st.sampled_from(("cells", "raster", "hilbert"))),
    )
    return PlanCall(
        settings,
        grid,
        front,
        back,
        start,
        queries,
        missing=draw(st.sampled_from(("none", "none", "none", "some", "some", "most", "all"))),
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 2)),
        dtype=draw(st.sampled_from(dtypes)),
        scale=draw(st.sampled_from((None, None, 0.05, -0.1))),
        odd=draw(st.sampled_from((None, None, None, *ODD))),
        seed=draw(st.integers(0, 2**16)),
    )
