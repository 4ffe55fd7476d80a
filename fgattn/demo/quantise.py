"""The model's weights in 8 bits: how they are stored, loaded and made.

Matrices are int8 with one fp32 scale per row, `name` and `name.scale`; everything small is bf16.

    python -m fgattn.demo.quantise SOURCE    # bf16 weights; rewrites the files beside this module

It also records the golden: what the model answers with the weights of SOURCE, so that a test can
tell what the 8 bits cost without having SOURCE.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import InvalidArgument
from ..runs.engine import Engine
from ..settings import Policy, Settings
from .model import CHANNELS, VideoTransformer
from .scenes import conditioning

HERE = Path(__file__).parent
WEIGHTS, GOLDEN = "wan_mini_int8.safetensors", "golden.safetensors"
SMALL = 32768  # tensors of up to this many numbers stay bf16
GOLDEN_SIGMAS = (1.0, 0.6, 0.2, 0.0)
GOLDEN_SIZE = (2, 8, 8)  # T, H, W: keeps the file small


def quantise(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights as they are stored."""
    stored = {}
    for name, weight in weights.items():
        if weight.ndim == 1 or weight.numel() <= SMALL:
            stored[name] = weight.to(torch.bfloat16)
            continue
        rows = weight.float().flatten(1)
        scale = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        stored[name] = (rows / scale).round().to(torch.int8).view(weight.shape)
        stored[name + ".scale"] = scale[:, 0]
    return stored


def dequantise(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stored weights in fp32, scales multiplied in."""
    weights = {}
    for name, value in stored.items():
        if value.dtype == torch.int8:
            scale = stored[name + ".scale"]
            weights[name] = (value.flatten(1) * scale[:, None]).view(value.shape)
        elif not name.endswith(".scale"):
            weights[name] = value.float()
    return weights


def load_model(path: Path = HERE / WEIGHTS) -> VideoTransformer:
    """The model with 8-bit or plain weights, fp32, on the CPU.

    Raises:
        InvalidArgument: the file is missing or damaged, or has other weights.
    """
    model = VideoTransformer().requires_grad_(False).train(False)
    try:
        model.load_state_dict(dequantise(load_file(path)))
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise InvalidArgument(
            "weights",
            str(path),
            f"the model's weights ({' '.join(str(error).split())[:200]})",
            "Get the file anew, from the project's repository or package.",
        ) from error
    return model


def record_golden(model: VideoTransformer) -> dict[str, torch.Tensor]:
    """Inputs and velocities, fp16 [3, 16, 2, 8, 8], along a short dense run, and its context."""
    engine = Engine(Settings(), Policy())  # outside a run: dense
    x = torch.randn(1, CHANNELS, *GOLDEN_SIZE, generator=torch.Generator().manual_seed(0))
    context = conditioning(0).half()  # as it is stored, too
    inputs, velocities = [], []
    for sigma, following in itertools.pairwise(GOLDEN_SIGMAS):
        x = x.half().float()
        velocity = model(x, torch.tensor([1000 * sigma]), context.float(), engine)
        inputs.append(x)
        velocities.append(velocity)
        x = x + (following - sigma) * velocity
    return {
        "sigma": torch.tensor(GOLDEN_SIGMAS[:-1]),
        "context": context,
        "input": torch.cat(inputs).half(),
        "velocity": torch.cat(velocities).half(),
    }


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m fgattn.demo.quantise SOURCE.safetensors\n")
        return 2
    source = Path(arguments[0])
    try:
        golden = record_golden(load_model(source))
    except InvalidArgument as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    save_file(quantise(load_file(source)), HERE / WEIGHTS)
    save_file(golden, HERE / GOLDEN)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
