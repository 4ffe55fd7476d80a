"""The node "FG-Attn Timing": what the patched models did in their last run."""

from comfy_api.latest import io

from ..fgattn.show import chart
from ..fgattn.show import text as report
from .patch import patch_of
from .pictures import BLANK, guarded, preview, tensor
from .status import own_id, show


class FGAttnTiming(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FGAttnTiming",
            display_name="FG-Attn Timing",
            category="model/patch",
            description="Shows run and step times, the speed-up of attention inside the run, and how much "
            "was computed. Connect the patched model, and the sampler's latent so that it runs afterwards.",
            search_aliases=["fgattn", "attention timing", "sparsity report"],
            inputs=[
                io.Model.Input("model", tooltip="The output of FG-Attn Sparse Attention that was sampled."),
                io.Latent.Input("latent", tooltip="The sampler's output; passed on unchanged."),
                io.Model.Input(
                    "model_2",
                    optional=True,
                    tooltip="A second patched model, for two-stage workflows such as Wan 2.2.",
                ),
            ],
            outputs=[
                io.Latent.Output("latent_out", display_name="LATENT", tooltip="The latent, unchanged."),
                io.String.Output("report", display_name="report", tooltip="The report as text."),
                io.Image.Output("chart", display_name="chart", tooltip="Steps and blocks as a picture."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, latent, model_2=None) -> io.NodeOutput:
        models = [m for m in (model, model_2) if m is not None]
        text, shown, reports = guarded(lambda: _words(models), lambda why: (why, why, []))
        picture = guarded(lambda: chart.draw(reports), lambda _: BLANK)
        show(own_id(cls), shown)
        return io.NodeOutput(latent, text, tensor(picture), ui=preview(cls, picture, text))


def _words(models: list) -> tuple[str, str, list]:
    """The whole text, a short one for the node, and the reports with their names."""
    reports, texts = [], []
    shown: list[str] = []
    for number, patched in enumerate(models, 1):
        name = f"model {number}" if len(models) > 1 else "FG-Attn"
        patch = patch_of(patched)
        last = patch.engine.last_report if patch else None
        if last:
            reports.append((name, last))
            body, short = report.text(last), report.summary(last)
        else:
            body = short = patch.without_run if patch else "no FG-Attn here"
        before = f"{name}: " if len(models) > 1 else ""
        texts.append(before + body)
        shown += filter(None, (before + short).splitlines())
    return "\n\n".join(texts), "\n\n".join(shown), reports  # the page folds single line breaks
