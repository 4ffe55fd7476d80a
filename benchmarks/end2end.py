"""One denoising step at the shapes of Wan 14B, dense cuDNN attention against FG-Attn at a fixed density.

Plain PyTorch, bf16, random weights; one block's weights serve all 40, so that any GPU can hold them. One
evaluation of the model, without guidance. Sparse steps plan and add the tail in every block. Random
weights give no natural density, so each block has the threshold that gives DENSITY on its own q and k;
those are found in an untimed step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from fgattn import Settings
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu, layer_norm, linear, rms_norm, scaled_dot_product_attention

from .measure import planned_attention, planned_error, sampled_error
from .peers import TOLERANCE
from .runner import Case, Run
from .shapes import LARGE_480P, LARGE_720P, QKV, Shape, for_density

DIM, FFN, HEADS, BLOCKS, TEXT = 5120, 13824, 40, 40, 512
DENSITY = 0.3
CHECKED_BLOCKS = (0, BLOCKS - 1)


def cases(quick: bool) -> Iterator[Case]:
    for shape in (LARGE_480P,) if quick else (LARGE_480P, LARGE_720P):
        columns = {"case": "step", "shape": shape.name, "L": shape.length, "heads": HEADS, "D": DIM // HEADS}
        # The check has warmed everything up.
        yield Case(columns, functools.partial(step_runs, shape), repeats=3, warmup=0)


@torch.no_grad()
def step_runs(shape: Shape) -> list[Run]:
    """A dense step and a sparse one; the error is that of two blocks' attention against float64."""
    model = Model(shape)
    dense, planned = Dense(), Planned(shape)
    model.step(planned)  # finds the thresholds
    planned.find = False
    for attention in (dense, planned):
        attention.check = True
        model.step(attention)
        attention.check = False
    density = float(torch.stack(planned.densities).mean())

    def run(name, attention, **columns) -> Run:
        def error(x) -> float:
            return max(attention.errors) if x.isfinite().all() else float("inf")

        return Run(name, functools.partial(no_grad_step, model, attention), error, TOLERANCE, columns)

    span = [s.threshold for s in planned.settings]
    return [
        run("cudnn", dense, density=1.0),
        run(
            "fgattn",
            planned,
            density=density,
            M=128,
            N=16,
            order="cells",
            threshold_low=min(span),
            threshold_high=max(span),
        ),
    ]


@torch.no_grad()
def no_grad_step(model, attention) -> torch.Tensor:
    return model.step(attention)


class Dense:
    """Self-attention by cuDNN; `check` makes it compare some blocks with float64."""

    def __init__(self):
        self.check = False
        self.errors: list[float] = []

    def __call__(self, q, k, v, block: int) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = scaled_dot_product_attention(q, k, v)
        if self.check and block in CHECKED_BLOCKS:
            self.errors.append(sampled_error(QKV(q, k, v), out, 128))
        return out


class Planned:
    """Self-attention by FG-Attn; `find` makes it look for each block's threshold first."""

    def __init__(self, shape: Shape):
        self.layout = shape.layout
        self.settings: list[Settings] = []
        self.densities: list[torch.Tensor] = []
        self.find, self.check = True, False
        self.errors: list[float] = []

    def __call__(self, q, k, v, block: int) -> torch.Tensor:
        if self.find:
            self.settings.append(for_density(q, k, Settings(), self.layout, DENSITY))
        out, plan = planned_attention(q, k, v, self.settings[block], self.layout)
        if self.check:
            self.densities.append(plan.density)
        if self.check and block in CHECKED_BLOCKS:
            self.errors.append(planned_error(QKV(q, k, v), plan, out))
        return out


@dataclass
class Attention:
    """Projections of one attention, [DIM, DIM] each."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor

    def split(self, x, source):
        """q, k, v [1, L, heads, D], q and k normalised over all channels."""
        q, k = (rms_norm(linear(y, w), (DIM,)) for y, w in ((x, self.q), (source, self.k)))
        return (y.unflatten(2, (HEADS, -1)) for y in (q, k, linear(source, self.v)))


class Model:
    """40 times the same block: modulated self-attention, cross-attention to text, modulated feed-forward."""

    def __init__(self, shape: Shape):
        generator = torch.Generator("cuda").manual_seed(0)

        def random(*size: int, scale: float = 1.0) -> torch.Tensor:
            return scale * torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16)

        self.itself, self.cross = (
            Attention(*(random(DIM, DIM, scale=DIM**-0.5) for _ in range(4))) for _ in range(2)
        )
        self.up, self.down = random(FFN, DIM, scale=DIM**-0.5), random(DIM, FFN, scale=FFN**-0.5)
        self.modulation = random(6, DIM, scale=0.1)
        self.x, self.text = random(1, shape.length, DIM), random(1, TEXT, DIM)
        self.cosine, self.sine = rotation(shape)

    def step(self, attention) -> torch.Tensor:
        x = self.x
        shift, scale, gate, shift2, scale2, gate2 = self.modulation
        for block in range(BLOCKS):
            y = torch.addcmul(shift, layer_norm(x, (DIM,)), 1 + scale)
            q, k, v = self.itself.split(y, y)
            q, k = (rotated(z, self.cosine, self.sine).transpose(1, 2) for z in (q, k))
            out = attention(q, k, v.transpose(1, 2), block).transpose(1, 2).flatten(2)
            x = torch.addcmul(x, linear(out, self.itself.out), gate)
            q, k, v = (z.transpose(1, 2) for z in self.cross.split(layer_norm(x, (DIM,)), self.text))
            out = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + linear(out, self.cross.out)
            y = torch.addcmul(shift2, layer_norm(x, (DIM,)), 1 + scale2)
            x = torch.addcmul(x, linear(gelu(linear(y, self.up), approximate="tanh"), self.down), gate2)
        return x


def rotation(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [L, 1, D/2] in fp32 of a rotary embedding over (t, h, w)."""
    half = DIM // HEADS // 2
    parts = half - 2 * (half // 3), half // 3, half // 3
    places = torch.meshgrid(
        *(torch.arange(n, device="cuda", dtype=torch.float32) for n in shape.grid), indexing="ij"
    )
    angles = [
        place.flatten()[:, None] * 10000.0 ** (-torch.arange(n, device="cuda") / n)
        for place, n in zip(places, parts, strict=True)
    ]
    angle = torch.cat(angles, 1)[:, None]
    return angle.cos(), angle.sin()


def rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [1, L, H, D], pairs of neighbouring channels."""
    even, odd = x.float().unflatten(3, (-1, 2)).unbind(4)
    pairs = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), 4)
    return pairs.flatten(3).to(x.dtype)
