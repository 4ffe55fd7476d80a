"""What the attention kernel and the tail kernel use for the sums of a softmax."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def own_sums(w, like):
    """Sums of what each thread holds of a row: fp32 [64, columns] -> [64, 8] in the layout of `like`.

    No thread exchanges anything with another: that is left to the end, for once.
    """
    sums = gl.sum(w.reshape([64, w.shape[1] // 8, 8]), 1)
    return gl.convert_layout(sums, like.type.layout, assert_trivial=True)
