"""What planning and tail hold at a time, against `call_bytes`, which decides how many heads run together."""

import weakref

import pytest
import torch
from fgattn import Settings, TokenLayout
from fgattn.call import Call
from fgattn.planning import call_bytes
from makers import planned, tail_of, tensors
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="no Triton: nothing to interpret")

GRID = (4, 18, 20)


class Held(TorchDispatchMode):
    """Bytes of the tensors that operations made and somebody still holds, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}  # of views
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, torch.Tensor) and (at := x.untyped_storage()._cdata) not in self._known | given:
                self._known.add(at)
                size = x.untyped_storage().nbytes()
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(x.untyped_storage(), self._free, at, size)
        return made

    def _free(self, at, size):
        self._known.discard(at)
        self.now -= size


@pytest.mark.parametrize(("m", "n"), [(128, 1), (64, 4), (128, 16)])
def test_call_bytes(m, n):
    """Small counts, and rows of bits that are mostly padding at this size, are not counted."""
    q, k, v = tensors(1, 4 * 18 * 20, dtype=torch.float16)
    settings, layout = Settings(threshold=1.5, tile_queries=m, tile_keys=n), TokenLayout(GRID)
    planned(q, k, v, settings, layout)  # fills the caches of the geometry
    with Held() as held:
        _, _, (plan, made) = planned(q, k, v, settings, layout)
        tail = tail_of(q, k, v, plan, "triton", made)
    expected = call_bytes(Call.to_plan(q, k, v, settings, layout))
    assert tail[0].isfinite().all() and 0.9 < held.most / expected < 1.15
