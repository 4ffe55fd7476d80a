"""The step that a call is in, with ComfyUI's real samplers: whatever they tell the model, and how often."""

import sys

import pytest
import torch
from makers import by_text

BLOCKS = 3
NO_STEPS = {"dpm_fast", "dpm_adaptive"}  # they evaluate at levels of their own


@pytest.fixture
def follow(pack, patched):
    """Sample over levels with a sampler object: the steps that it says and ours then; and the report.

    Of a flow model at shift 8: of 20 steps the first are less than 1 % apart.
    """
    import comfy.sample
    from comfy.samplers import calculate_sigmas

    @torch.inference_mode()
    def run(model, sampler, sigmas=None, steps=20, **inputs):
        model = patched(model, **inputs)
        if sigmas is None:
            sigmas = calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps).tolist()
        noise = torch.randn(1, 16, 3, 16, 24, generator=torch.Generator().manual_seed(0))
        text = [[torch.randn(1, 8, 4096, generator=torch.Generator().manual_seed(1)), {}]]
        engine, seen = sys.modules["fgattn_pack.nodes.patch"].patch_of(model).engine, []
        comfy.sample.sample_custom(
            model,
            noise,
            1.0,
            sampler,
            torch.tensor(sigmas),
            text,
            text,
            torch.zeros_like(noise),
            callback=lambda i, *_: seen.append((i, engine.run.step)),
            disable_pbar=True,
            seed=0,
        )
        return seen, engine.last_report

    return run


def sampler_of(name, factor=1.0, **options):
    """A sampler that tells the model a multiple of its levels, as nodes that add detail do."""
    from comfy.samplers import KSAMPLER, sampler_object

    inner = sampler_object(name)

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, **more):
        def told(x, sigma, **args):
            return model(x, sigma * factor, **args)

        told.inner_model = model.inner_model  # where samplers look for the model's noise schedule
        return inner.sampler_function(
            told, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **more
        )

    return KSAMPLER(sample, {**inner.extra_options, **options}, inner.inpaint_options)


def test_every_sampler_is_followed(wan, follow):
    """Each says which step it is in when it has evaluated for it; so do we."""
    from comfy.samplers import SAMPLER_NAMES, sampler_object

    wrong = {}
    for name in SAMPLER_NAMES:
        seen, report = follow(wan, sampler_object(name), steps=8, warmup_steps=2)
        assert by_text(report)["warm-up step"] >= 2 * BLOCKS and report.failure is None, name
        if any(i != step for i, step in seen) or [i for i, _ in seen] != [*range(8)]:
            wrong[name] = seen
    assert wrong.keys() <= NO_STEPS, wrong


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler", {"factor": 0.98}),
        ("heun", {"factor": 0.98}),
        ("dpmpp_sde", {"factor": 0.98}),
        ("dpmpp_2m", {"factor": 0.95}),
        ("lcm", {"factor": 0.98}),
        ("uni_pc", {"factor": 0.98}),
        ("euler", {"s_churn": 2.0}),
        ("euler", {"s_churn": 20.0}),
        ("heun", {"s_churn": 2.0}),
        ("heunpp2", {"s_churn": 2.0}),
        ("dpm_2", {"s_churn": 2.0}),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(f"{k} {v:g}" for k, v in x.items()),
)
def test_levels_that_are_not_the_schedules(wan, follow, name, options):
    """Two warm-up steps are two, and the final one is there; one evaluation more where a step has two."""
    seen, report = follow(wan, sampler_of(name, **options), warmup_steps=2, final_dense_steps=1)
    assert [step for _, step in seen] == [i for i, _ in seen] == [*range(20)]
    calls = by_text(report)
    assert 2 * BLOCKS <= calls["warm-up step"] <= 4 * BLOCKS
    assert BLOCKS <= calls["final dense step"] <= 3 * BLOCKS
    assert [s.index for s in report.steps if s.warmup] == [0, 1]


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "lcm"])
def test_a_first_level_that_is_repeated(wan, follow, name):
    """The run has the warm-up that its report has."""
    seen, report = follow(wan, sampler_of(name), sigmas=[1.0, 1.0, 0.9, 0.5, 0.0], warmup_steps=2)
    assert seen == [(i, i) for i in range(4)]
    assert report.settings.warmup_steps == 1 and by_text(report)["warm-up step"] == BLOCKS
