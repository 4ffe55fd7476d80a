"""python -m fgattn doctor."""

import numpy as np
import pytest
import torch
from fgattn import __main__ as command
from fgattn import __version__
from fgattn.backends import hopper, registry, triton
from fgattn.backends.base import Eligible
from fgattn.outcomes import Outcome, Reason


def test_doctor_names_versions_and_what_runs(capsys):
    """Every line that a bug report needs."""
    assert command.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    values = {line[:15].strip(): line[16:] for line in lines}
    assert values["fgattn"] == __version__
    assert values["torch"].startswith(torch.__version__)
    assert values["numpy"] == np.__version__
    assert "triton" in values and "python" in values
    assert values["runs"] == "torch"  # the CPU is the last device


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Eligible(hopper.BACKEND), "hopper: its self-test passed"),
        (
            Eligible(triton.BACKEND, (("hopper", "compute capability 8.9"),)),
            "triton (no hopper: compute capability 8.9): its self-test passed",
        ),
        (
            Reason(Outcome.NO_KERNEL, "the kernels' self-test is off by 1.0e+00"),
            "dense attention: the kernels' self-test is off by 1.0e+00",
        ),
    ],
    ids=["fastest", "a step down", "dense"],
)
def test_a_gpu_gets_the_engine_s_verdict(monkeypatch, answer, says):
    """With the reason where the fastest kernel, or none, runs."""
    monkeypatch.setattr(registry, "on_device", lambda device, settings: answer)
    assert command.verdict(torch.device("cuda", 0)) == says


def test_driver_is_one_line(tmp_path, monkeypatch):
    """What the file says first, or where else to look."""
    monkeypatch.setattr(command, "DRIVER", tmp_path / "version")
    assert "nvidia-smi" in command.driver()
    command.DRIVER.write_text("NVRM version: 580.159.03\nGCC version: 13\n")
    assert command.driver() == "NVRM version: 580.159.03"


@pytest.mark.parametrize("arguments", [[], ["help"], ["doctor", "--all"]], ids=str)
def test_anything_else_is_usage(capsys, arguments):
    """Exit code 2 and one line on standard error."""
    assert command.main(arguments) == 2
    assert capsys.readouterr().err.startswith("usage: ")
