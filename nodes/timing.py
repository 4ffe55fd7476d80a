"""The node "FG-Attn Timing": what the patched models did in their last run."""

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..fgattn.show import chart
from ..fgattn.show import text as report
from .patch import patch_of
from .status import show


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
        reports, texts = [], []
        shown: list[str] = []
        models = [m for m in (model, model_2) if m is not None]
        for number, patched in enumerate(models, 1):
            name = f"model {number}" if len(models) > 1 else "FG-Attn"
            patch = patch_of(patched)
            last = patch.engine.last_report if patch else None
            if last:
                reports.append((name, last))
                body, short = report.text(last), report.summary(last)
            else:
                body = short = "no run yet" if patch else "no FG-Attn here"
            before = f"{name}: " if len(models) > 1 else ""
            texts.append(before + body)
            shown += filter(None, (before + short).splitlines())
        text = "\n\n".join(texts)
        picture = torch.from_numpy(np.asarray(chart.draw(reports).convert("RGB"), np.float32) / 255)[None]
        show(cls.hidden.unique_id, "\n\n".join(shown))  # the page folds single line breaks
        both = ui.PreviewImage(picture, cls=cls).as_dict() | ui.PreviewText(text).as_dict()
        return io.NodeOutput(latent, text, picture, ui=both)
