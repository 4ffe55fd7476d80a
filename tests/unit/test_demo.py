"""The demo: its 8-bit model, its sampling loop, and the command."""

import signal
from types import SimpleNamespace

import pytest
import torch
from fgattn.demo import __main__ as command
from fgattn.demo import generate as sampling
from fgattn.demo import quantise, scenes, show
from fgattn.runs.engine import Engine
from fgattn.settings import Policy, Settings
from makers import by_text
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = quantise.HERE.parents[1]
ORIGINAL = ROOT.parent / "shared" / "testbed" / "wan_mini.safetensors"
BOUND = 0.02  # relative error that 8 bits may cost
SMALL = (3, 16, 16)  # T, H, W of a latent: 192 tokens


@pytest.fixture(scope="module")
def model():
    return quantise.load_model()


@pytest.fixture(scope="module")
def golden():
    return load_file(quantise.HERE / quantise.GOLDEN)


@pytest.fixture(scope="module")
def original():
    if not ORIGINAL.exists():
        pytest.skip("no bf16 weights in ../shared/testbed to compare with; their golden is checked instead")
    return quantise.load_model(ORIGINAL)


def dense_engine():
    """Outside a run, everything is dense."""
    return Engine(Settings(), Policy())


def answer(model, golden):
    """What a model answers to the inputs of the golden."""
    context = golden["context"].float().expand(len(golden["sigma"]), -1, -1)
    return model(golden["input"].float(), 1000 * golden["sigma"], context, dense_engine())


def start(seed=0, size=SMALL):
    """Noise and context."""
    noise = torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(seed))
    return noise, scenes.conditioning(seed)


def test_8_bits_keep_the_answers_of_the_original(model, golden):
    """At each of the recorded noise levels."""
    answers = answer(model, golden)
    for mine, recorded in zip(answers, golden["velocity"].float(), strict=True):
        assert sampling.relative_error(mine, recorded) < BOUND


def test_the_golden_notices_other_weights(model, golden):
    """Control: one block's values turned off is far outside the bound."""
    broken = quantise.load_model()
    broken.blocks[3].self_attn.v.weight.zero_()
    assert sampling.relative_error(answer(broken, golden), golden["velocity"].float()) > 2 * BOUND


def test_the_golden_is_the_original_s(original, golden):
    """The committed record matches the weights that it was made from, to fp16."""
    assert sampling.relative_error(answer(original, golden), golden["velocity"].float()) < 1e-3


def test_8_bits_at_the_demo_s_size(original, model):
    """The whole length, from noise to a nearly clean video."""
    noise, context = start(1, command.CPU_SIZE)
    video, _ = sampling.generate(original, noise, context, dense_engine(), 3)
    for sigma in (1.0, 0.8, 0.2, 0.05):
        x, time = (1 - sigma) * video + sigma * noise, torch.tensor([1000 * sigma])
        results = [m(x, time, context, dense_engine()) for m in (model, original)]
        assert sampling.relative_error(*results) < BOUND, sigma


def test_the_shipped_files_are_small_and_typed():
    """Matrices in int8 with fp32 scales, the rest in bf16."""
    stored = load_file(quantise.HERE / quantise.WEIGHTS)
    for name, value in stored.items():
        matrix = name + ".scale" in stored
        scale = name.endswith(".scale")
        assert value.dtype == (torch.int8 if matrix else torch.float32 if scale else torch.bfloat16), name
    assert (quantise.HERE / quantise.WEIGHTS).stat().st_size < 23e6
    assert (quantise.HERE / quantise.GOLDEN).stat().st_size < 100e3


def test_quantising_is_off_by_half_a_step_at_most():
    """Per row, and rows of zeros stay zeros."""
    weight = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-6, 3, 512)[:, None]
    weight[7] = 0
    back = quantise.dequantise(quantise.quantise({"w": weight, "b": weight[0]}))
    assert ((back["w"] - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 * 0.501).all()
    assert torch.equal(back["b"], weight[0].bfloat16().float()) and back.keys() == {"w", "b"}


def test_quantise_wants_a_source(capsys):
    assert quantise.main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_schedule_falls_from_one_to_zero():
    """Shift 8: the middle of 12 steps is still at 8/9."""
    sigmas = sampling.schedule(12)
    assert len(sigmas) == 13 and sigmas[0] == 1 and sigmas[-1] == 0
    assert sigmas == sorted(sigmas, reverse=True) and sigmas[6] == pytest.approx(8 / 9)


def test_euler_finds_the_video_of_a_perfect_model():
    """With velocity = noise - video, any number of steps ends at the video."""
    noise, context = start()
    video = torch.ones_like(noise)

    class Perfect(torch.nn.Module):
        patch_embedding = SimpleNamespace(weight=noise)

        def forward(self, x, time, context, engine):
            return (noise - video).expand_as(x)

    found, report = sampling.generate(Perfect(), noise, context, dense_engine(), 5)
    torch.testing.assert_close(found, video)
    assert [step.index for step in report.steps] == [0, 1, 2, 3, 4]


def test_every_block_goes_through_the_engine(model):
    """8 calls a step, dense in the warm-up step, then sparse in blocks 0 to 7."""
    _, report = sampling.generate(model, *start(), Engine(Settings(), Policy(min_tokens=1)), 4)
    assert by_text(report) == {"warm-up step": 8, "sparse": 24} and not report.failure
    assert [block.block for block in report.blocks] == list(range(8)) and report.tokens == 192


def test_keeping_everything_is_dense(model):
    """Threshold 0 changes only rounding; threshold 5 changes the video."""

    def latent(settings, policy):
        return sampling.generate(model, *start(), Engine(settings, policy), 2)[0]

    dense = latent(Settings(), Policy(dense_blocks=frozenset(range(8))))
    assert sampling.relative_error(latent(Settings(threshold=0.0), Policy(warmup_steps=0)), dense) < 1e-4
    assert sampling.relative_error(latent(Settings(threshold=5.0), Policy(warmup_steps=0)), dense) > 1e-2


def test_conditioning_is_the_training_s():
    """Eight tokens, the last one empty; the same for the same seed."""
    tokens = scenes.conditioning(3)
    assert tokens.shape == (1, 8, 4096) and not tokens[0, 7].any() and tokens[0, :7].any(1).all()
    assert torch.equal(tokens, scenes.conditioning(3)) and not torch.equal(tokens, scenes.conditioning(4))


def test_latent_channels_become_frames():
    """Channel 3 s + c of latent frame t is colour c of frame 4 t + s."""
    latent = torch.zeros(16, 2, 4, 6)
    latent[3 * 2 + 1, 1] = 0.32
    frames = scenes.to_rgb(latent)
    assert frames.shape == (8, 4, 6, 3)
    expected = torch.full_like(frames, 0.45)
    expected[4 * 1 + 2, ..., 1] = 0.55
    torch.testing.assert_close(frames, expected)


def test_psnr_of_a_known_difference():
    """An error of 0.1 everywhere is 20 dB; none is infinite."""
    frames = torch.full((4, 8, 8, 3), 0.5)
    assert sampling.psnr(frames + 0.1, frames) == pytest.approx(20, abs=1e-3)
    assert sampling.psnr(frames, frames) == float("inf")


@pytest.fixture
def small(monkeypatch):
    """The command on the CPU, at a small size."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "CPU_SIZE", SMALL)


def test_the_command_prints_and_writes(small, tmp_path, capsys):
    """A table with both columns, the video of both runs, and the chart."""
    out = tmp_path / "new" / "folder"
    assert command.main(["--steps", "4", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for word in ("dense", "FG-Attn", "PSNR", "density, executed", "not for speed", "192 tokens"):
        assert word in text
    with Image.open(out / "side_by_side.webp") as video:
        assert video.n_frames == 12 and video.size == (832, 416 + show.LABEL_HEIGHT)
    with Image.open(out / "chart.png") as picture:
        assert picture.width == 900


def test_a_run_that_went_dense_fails(small, tmp_path, monkeypatch, capsys):
    """Never a silently dense demo: it says why and exits with 1."""

    def broken(*args, **kwargs):
        raise RuntimeError("no plan today")

    monkeypatch.setattr("fgattn.backends.execute.plan_of", broken)
    assert command.main(["--steps", "1", "--out", str(tmp_path)]) == 1
    assert "no plan today" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--threshold", "-1"], "threshold: got -1.0; allowed: a finite number"),
        (["--threshold", "nan"], "threshold: got nan; allowed: a finite number"),
        (["--tile-queries", "17"], "tile_queries: got 17; allowed: 16, 32, 64, 128"),
        (["--tile-keys", "0"], "tile_keys: got 0; allowed: 1, 2, 4"),
        (["--steps", "0"], "steps: got 0; allowed: a whole number from 1 to 1000"),
        (["--steps", "999999999"], "steps: got 999999999; allowed: a whole number from 1 to 1000"),
        (["--seed", "-1"], "seed: got -1; allowed: a whole number from 0"),
        (["--out", "file/folder"], "out: got 'file/folder'; allowed: a folder that can be written"),
    ],
)
def test_wrong_values_are_explained(arguments, message, tmp_path, monkeypatch, capsys):
    """The library's message, exit code 2, and nothing computed."""
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "run", lambda *args: pytest.fail("computed"))
    assert command.main(arguments) == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("name", command.PICTURES)
def test_a_picture_that_cannot_be_written_is_found_first(name, tmp_path, monkeypatch, capsys):
    """Not after both generations; pictures of an earlier run stay as they are."""
    (other,) = set(command.PICTURES) - {name}
    (tmp_path / name).mkdir()
    (tmp_path / other).write_bytes(b"earlier")
    monkeypatch.setattr(command, "run", lambda *args: pytest.fail("computed"))
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "allowed: a folder that can be written (Is a directory)" in capsys.readouterr().err
    assert (tmp_path / other).read_bytes() == b"earlier"


def test_a_folder_without_pictures_stays_empty(tmp_path, monkeypatch):
    """What is tried is taken away again."""
    monkeypatch.setattr(command, "run", lambda *args: 0)
    assert command.main(["--out", str(tmp_path)]) == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "header", "another model's", "no scale"])
def test_damaged_weights_are_one_sentence(kind, small, tmp_path, monkeypatch, capsys):
    """Whatever is wrong with the file: its name, and what to do."""
    weights, path = (quantise.HERE / quantise.WEIGHTS).read_bytes(), tmp_path / quantise.WEIGHTS
    if kind == "another model's":
        save_file({"w": torch.zeros(2)}, path)
    elif kind == "no scale":
        stored = load_file(quantise.HERE / quantise.WEIGHTS)
        save_file({name: x for name, x in stored.items() if not name.endswith(".scale")}, path)
    elif kind != "missing":
        path.write_bytes({"empty": b"", "truncated": weights[:-1000], "header": weights[:50]}[kind])
    load = quantise.load_model
    monkeypatch.setattr(command, "load_model", lambda: load(path))
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: weights: got ") and said.count("\n") == 1
    assert quantise.WEIGHTS in said and "Get the file anew" in said and "Traceback" not in said
    assert quantise.main([str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: weights: got ")
    assert (quantise.HERE / quantise.WEIGHTS).read_bytes() == weights


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "The demo was stopped before its end"),
        (OSError(28, "No space left on device"), 1, "cannot be written: [Errno 28] No space left on device"),
    ],
    ids=["Ctrl-C", "full disk"],
)
def test_what_ends_the_demo_early_is_one_sentence(error, code, says, small, tmp_path, monkeypatch, capsys):
    """No traceback, and an exit code that scripts notice."""

    def stop(*args):
        raise error

    monkeypatch.setattr(command, "side_by_side", stop)
    assert command.main(["--steps", "1", "--out", str(tmp_path)]) == code
    assert capsys.readouterr().err.splitlines()[-1].count(says) == 1


def test_ctrl_c_in_the_middle_of_a_generation(small, tmp_path, monkeypatch, capsys):
    """The signal comes while the engine is at work, which survives most of what fails in it."""
    calls = []

    def interrupted(*args):
        calls.append(args)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("fgattn.backends.execute.plan_of", interrupted)
    assert command.main(["--steps", "4", "--out", str(tmp_path)]) == 130 and len(calls) == 1
    assert "The demo was stopped before its end" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_number_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--threshold", "much"])
    assert stop.value.code == 2 and "--threshold" in capsys.readouterr().err
