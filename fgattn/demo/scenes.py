"""What the model was trained on: textured shapes that move over a panning background.

A scene is described by 8 conditioning tokens: one for the background, one for each of 6 objects,
one empty. A latent frame holds 4 video frames: 12 channels of RGB, then 4 of detail.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

OBJECTS = 6
TOKENS, TEXT_DIM = 8, 4096
ATTRIBUTES = 32  # of a token before its projection
SPREAD = 3.4  # brings uniform attributes to about unit variance
PROJECTION_SEED = 1234  # as in training
LATENT_FRAMES = 4  # video frames per latent frame
MEAN, GAIN = 0.45, 3.2  # latent = (rgb - MEAN) * GAIN


def conditioning(seed: int) -> torch.Tensor:
    """The random scene of a seed, fp32 [1, 8, 4096]."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(1, *shape, generator=random)

    looks = [draw(OBJECTS, 1) for _ in ("kind", "size", "stripes x", "stripes y", "phase", "spin")]
    colours = [draw(OBJECTS, 3) for _ in range(2)]
    place = [draw(OBJECTS, 1) for _ in ("x", "y")]
    velocity = (draw(OBJECTS, 2) - 0.5) * 0.9
    visible = (draw(OBJECTS, 1) < 0.75).float()
    background = draw(1, 14)
    objects = torch.cat((visible, *looks, *colours, *place, velocity), -1)
    tokens = torch.cat((_attributes(background), _attributes(objects)), 1)
    return pad(tokens, (0, 0, 0, TOKENS - 1 - OBJECTS)) @ _projection()


def to_rgb(latent: torch.Tensor) -> torch.Tensor:
    """Latent [16, T, H, W] -> frames [4T, H, W, 3] in 0..1."""
    colours = latent[: 3 * LATENT_FRAMES].unflatten(0, (LATENT_FRAMES, 3)).permute(2, 0, 3, 4, 1)
    return (colours.flatten(0, 1) / GAIN + MEAN).clamp(0, 1)


def _attributes(values: torch.Tensor) -> torch.Tensor:
    return pad((values - 0.5) * SPREAD, (0, ATTRIBUTES - values.shape[-1]))


def _projection() -> torch.Tensor:
    random = torch.Generator().manual_seed(PROJECTION_SEED)
    return torch.randn(ATTRIBUTES, TEXT_DIM, generator=random) / ATTRIBUTES**0.5
