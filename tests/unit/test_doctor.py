"""python -m fgattn doctor."""

import numpy as np
import pytest
import torch
from fgattn import __main__ as command
from fgattn import __version__


def test_doctor_names_versions_and_what_runs(capsys):
    """Every line that a bug report needs, and for the CPU the reason for plain torch."""
    assert command.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    values = {line[:15].strip(): line[16:] for line in lines}
    assert values["fgattn"] == __version__
    assert values["torch"].startswith(torch.__version__)
    assert values["numpy"] == np.__version__
    assert "triton" in values and "python" in values
    assert values["runs"] == "torch: no Triton kernel runs on a CPU"  # the CPU is the last device


@pytest.mark.parametrize("reason", [None, "the kernel's self-test is off by 1.0e+00"])
def test_a_gpu_gets_the_engine_s_verdict(monkeypatch, reason):
    """A GPU whose kernel fails is reported dense, with the reason."""
    monkeypatch.setattr(command.runtime, "missing", lambda: None)
    monkeypatch.setattr(command.runtime, "device_reason", lambda device: reason)
    monkeypatch.setattr(command.runtime, "hopper_reason", lambda device: None)
    verdict = command._implementation(torch.device("cuda", 0))
    assert verdict == (f"dense attention: {reason}" if reason else "hopper: the kernel's self-test passed")


def test_a_step_down_has_its_reason(monkeypatch):
    """Where the faster kernel does not run, the line says why."""
    monkeypatch.setattr(command.runtime, "missing", lambda: None)
    monkeypatch.setattr(command.runtime, "device_reason", lambda device: None)
    monkeypatch.setattr(command.runtime, "hopper_reason", lambda device: "compute capability 8.9")
    assert command._implementation(torch.device("cuda", 0)) == (
        "triton (no hopper: compute capability 8.9): the kernel's self-test passed")


def test_without_triton_a_gpu_is_dense(monkeypatch):
    """The probe of the device is not even tried."""
    monkeypatch.setattr(command.runtime, "missing", lambda: "Triton is not installed")
    monkeypatch.setattr(command.runtime, "device_reason", lambda device: pytest.fail("probed"))
    assert command._implementation(torch.device("cuda", 0)) == "dense attention: Triton is not installed"


def test_driver_is_one_line(tmp_path, monkeypatch):
    """What the file says first, or where else to look."""
    monkeypatch.setattr(command, "DRIVER", tmp_path / "version")
    assert "nvidia-smi" in command._driver()
    command.DRIVER.write_text("NVRM version: 580.159.03\nGCC version: 13\n")
    assert command._driver() == "NVRM version: 580.159.03"


@pytest.mark.parametrize("arguments", [[], ["help"], ["doctor", "--all"]], ids=str)
def test_anything_else_is_usage(capsys, arguments):
    """Exit code 2 and one line on standard error."""
    assert command.main(arguments) == 2
    assert capsys.readouterr().err.startswith("usage: ")
