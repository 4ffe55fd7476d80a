"""python -m fgattn doctor: what a bug report needs."""

from __future__ import annotations

import contextlib
import logging
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from . import __version__
from .backends import registry
from .backends.base import Eligible
from .settings import Settings

DRIVER = Path("/proc/driver/nvidia/version")


def doctor() -> str:
    """Versions, GPUs, and what would run sparse attention on each device, with the reason."""
    lines = [
        ("fgattn", __version__),
        ("python", f"{platform.python_version()}, {platform.platform()}, {platform.machine()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}"),
        ("triton", _version("triton", "triton-windows", "pytorch-triton")),
        ("numpy", _version("numpy")),
    ]
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if devices:
        lines.append(("driver", driver()))
    for device in devices:
        properties = torch.cuda.get_device_properties(device)
        lines += [
            (
                str(device),
                f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{properties.total_memory / 2**30:.1f} GiB",
            ),
            ("  runs", verdict(device)),
        ]
    lines += [("cpu", f"{torch.get_num_threads()} threads"), ("  runs", verdict(torch.device("cpu")))]
    return "\n".join(f"{name:15} {value}".rstrip() for name, value in lines)


def verdict(device: torch.device) -> str:
    """What runs sparse calls on a device in a run with default settings."""
    answer = registry.on_device(device, Settings())
    if not isinstance(answer, Eligible):
        return f"dense attention: {answer.text}"
    tested = ": its self-test passed" if answer.backend.probe else ""
    return answer.text + tested


def _version(*names: str) -> str:
    """Version of the first of these packages that is installed."""
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name) + (f" ({name})" if name != names[0] else "")
    return "not installed"


def driver() -> str:
    """NVIDIA's own line on Linux; torch does not tell."""
    try:
        return DRIVER.read_text().partition("\n")[0]
    except OSError:
        return "unknown here; nvidia-smi shows it"


def main(arguments: list[str]) -> int:
    if arguments != ["doctor"]:
        sys.stderr.write("usage: python -m fgattn doctor\n")
        return 2
    print(doctor())
    return 0


if __name__ == "__main__":
    logging.getLogger("fgattn").setLevel(logging.INFO)  # says when kernels are compiled, and why one is left
    logging.getLogger("fgattn").addHandler(logging.StreamHandler())
    sys.exit(main(sys.argv[1:]))
