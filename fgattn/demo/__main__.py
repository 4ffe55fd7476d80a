"""python -m fgattn.demo: one video from one seed, dense and with FG-Attn, and what differs."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from ..errors import InvalidArgument
from ..outcomes import Outcome
from ..runs.engine import Engine
from ..settings import Policy, Settings
from ..show import chart
from ..show.text import describe, headline
from .generate import generate, psnr, relative_error
from .model import CHANNELS, LAYERS
from .quantise import load_model
from .scenes import conditioning, to_rgb
from .show import Progress, side_by_side, table

PICTURES = "side_by_side.webp", "chart.png"
CPU_SIZE, CPU_STEPS = (9, 24, 32), 12  # T, H, W of the latent: 1 728 tokens
MOST_STEPS = 1000
INTERRUPTED = 130  # exit code, as shells have it
CUDA_SIZE, CUDA_STEPS = (21, 60, 104), 20  # 32 760 tokens, 480p


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        settings, steps = _checked(options)
        return run(settings, steps, options.seed, options.out)
    except InvalidArgument as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:  # such as a disk that is full by now
        sys.stderr.write(f"\nerror: the pictures cannot be written: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nThe demo was stopped before its end; no picture is complete.\n")
        return INTERRUPTED


def run(settings: Settings, steps: int, seed: int, out: Path) -> int:
    """Generate, print, write; 1 if FG-Attn could not run sparse."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    size = CUDA_SIZE if cuda else CPU_SIZE
    model = load_model().to(device, torch.bfloat16 if cuda else torch.float32)
    noise = torch.randn(1, CHANNELS, *size, generator=torch.Generator().manual_seed(seed)).to(device)
    context = conditioning(seed).to(device)
    policies = {
        "dense": Policy(dense_blocks=frozenset(range(LAYERS)), min_tokens=1),
        "FG-Attn": Policy(min_tokens=1),
    }
    latents, reports = [], []
    for name, policy in policies.items():
        latent, report = generate(
            model, noise, context, Engine(settings, policy), steps, Progress(name, steps)
        )
        latents.append(latent[0].float())
        reports.append(report)
    dense, sparse = reports
    ran_sparse = sparse.count(Outcome.SPARSE) > 0 and not sparse.failure
    videos = [to_rgb(latent) for latent in latents]
    print(f"\n{sparse.tokens} tokens, {steps} steps on {sparse.device}; {describe(sparse.settings)}\n")
    print(table(dense, sparse, relative_error(latents[1], latents[0]), psnr(videos[1], videos[0])))
    print("\nTimes are medians; those of FG-Attn leave its dense warm-up steps out.")
    if not cuda:
        print("This is a CPU: sparse attention is shown for its quality here, not for speed.")
    if not ran_sparse:
        print(f"FG-Attn did not run sparse. {headline(sparse)}")
    side_by_side(list(zip(policies, videos, strict=True)), out / PICTURES[0])
    names = "dense (for comparison)", "FG-Attn"
    chart.draw(list(zip(names, reports, strict=True))).save(out / PICTURES[1])
    print(f"Written: {', '.join(str(out / name) for name in PICTURES)}")
    return 0 if ran_sparse else 1


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m fgattn.demo", description=__doc__)
    parser.add_argument(
        "--threshold",
        type=float,
        default=defaults.threshold,
        help="multiple of the uniform probability that is kept (default: %(default)s)",
    )
    parser.add_argument(
        "--tile-queries",
        type=int,
        default=defaults.tile_queries,
        help="queries that share one selection (default: %(default)s)",
    )
    parser.add_argument(
        "--tile-keys",
        type=int,
        default=defaults.tile_keys,
        help="keys that are kept or skipped together (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, help=f"sampling steps (default: {CPU_STEPS}, on a GPU {CUDA_STEPS})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of scene and noise (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_out"), help="folder for the pictures (default: %(default)s)"
    )
    return parser


def _checked(options: argparse.Namespace) -> tuple[Settings, int]:
    """Settings and steps; the folder exists afterwards, and its files can be written."""
    settings = Settings(
        threshold=options.threshold, tile_queries=options.tile_queries, tile_keys=options.tile_keys
    )
    steps = options.steps
    if steps is None:
        steps = CUDA_STEPS if torch.cuda.is_available() else CPU_STEPS
    if not 1 <= steps <= MOST_STEPS:
        raise InvalidArgument("steps", steps, f"a whole number from 1 to {MOST_STEPS}", "12 shows enough.")
    if not 0 <= options.seed < 2**63:
        raise InvalidArgument("seed", options.seed, "a whole number from 0 to 2**63 - 1", "Use 0.")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for name in PICTURES:
            _try_to_write(options.out / name)
    except OSError as error:
        raise InvalidArgument(
            "out",
            options.out.as_posix(),
            f"a folder that can be written ({error.strerror})",
            "Name another one.",
        ) from None
    return settings, steps


def _try_to_write(path: Path) -> None:
    """Raise OSError unless the file can be written; it stays as it is, or absent."""
    existed = path.exists()
    with path.open("ab"):
        pass
    if not existed:
        path.unlink()


if __name__ == "__main__":
    logging.getLogger("fgattn").setLevel(logging.INFO)  # says when kernels are compiled
    logging.getLogger("fgattn").addHandler(logging.StreamHandler())
    sys.exit(main())
