"""The node "FG-Attn Sparse Attention": checks the settings and patches the model."""

from comfy_api.latest import io

from ..fgattn.errors import InvalidArgument
from ..fgattn.methods import METHOD_NAMES
from ..fgattn.settings import ORDERS, TILE_KEYS, TILE_QUERIES, Policy, Settings, check_boolean, parse_blocks
from .inputs import MOST_PARAMETER, MOST_THRESHOLD, MOST_WARMUP, Most, chosen
from .patch import Patch
from .status import own_id


class FGAttnPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FGAttnPatch",
            display_name="FG-Attn Sparse Attention",
            category="model/patch",
            description="Skips attention scores that hardly matter, so that video models run faster. "
            "Put it between the model loader (after LoRAs and other patches) and the sampler; bypass it "
            "(Ctrl+B) to compare.",
            search_aliases=["fgattn", "fine-grained attention", "sparse attention", "speed up video"],
            inputs=[
                io.Model.Input("model", tooltip="A video diffusion model, such as Wan 2.1 or 2.2."),
                io.Float.Input(
                    "threshold",
                    default=Settings.threshold,
                    min=0.0,
                    max=Most(MOST_THRESHOLD),
                    step=0.05,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="Keeps what is expected to get at least this many times the average attention. "
                    "0 keeps everything (dense); 0.7 is careful, 1 balanced, 2 fast.",
                ),
                io.Combo.Input(
                    "tile_queries",
                    options=[str(m) for m in TILE_QUERIES],
                    default=str(Settings.tile_queries),
                    tooltip="M: neighbouring video tokens that share one selection. 128 is the fastest; "
                    "smaller tiles select more precisely and run slower.",
                ),
                io.Combo.Input(
                    "tile_keys",
                    options=[str(n) for n in TILE_KEYS],
                    default=str(Settings.tile_keys),
                    tooltip="N: neighbouring keys that are kept or skipped together. 16 is a good start; "
                    "below 16 each key is judged on its own, which costs planning time.",
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=Policy.warmup_steps,
                    min=0,
                    max=MOST_WARMUP,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="Dense steps at the start, where the picture is laid out; at most a quarter of "
                    "the run's steps. Only in runs that begin at full noise, so not in a second sampler.",
                ),
                io.Int.Input(
                    "min_tokens",
                    default=Policy.min_tokens,
                    min=0,
                    max=1_000_000,
                    optional=True,
                    advanced=True,
                    tooltip="Shortest sequence that runs sparse. 0 is automatic: on CUDA, calls that would "
                    "not be faster, too short or keeping too much, run dense; none on CPU.",
                ),
                io.String.Input(
                    "dense_blocks",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip='Transformer blocks that stay dense, such as "0, 1, 38-39". Empty: none.',
                ),
                io.Int.Input(
                    "final_dense_steps",
                    default=Policy.final_dense_steps,
                    min=0,
                    max=50,
                    optional=True,
                    advanced=True,
                    tooltip="Dense steps at the end of a run that ends without noise; 0 for none.",
                ),
                io.Boolean.Input(
                    "tail",
                    default=Settings.tail,
                    optional=True,
                    advanced=True,
                    tooltip="Adds a pooled estimate of what is skipped: two to three times less error.",
                ),
                io.Combo.Input(
                    "order",
                    options=list(ORDERS),
                    default=Settings.order,
                    optional=True,
                    advanced=True,
                    tooltip="Token order for tiles and slices: cells are 16 tokens, compact in time, height "
                    "and width; raster is the model's own order; hilbert follows a 3-D Hilbert curve.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHOD_NAMES),
                    default=Settings.method,
                    optional=True,
                    advanced=True,
                    tooltip="How keys are selected. The other ones are published methods to compare with: "
                    "they plan more slowly, take their strength from method_parameter, ignore threshold.",
                ),
                io.Float.Input(
                    "method_parameter",
                    default=Settings.method_parameter,
                    min=0.0,
                    max=Most(MOST_PARAMETER),
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="Strength of a method other than threshold; 0 is its own default. top_k and "
                    "hierarchical: share of the keys, up to 1 (0.3); sol: tau, higher is faster (1.3); "
                    "radial: decay factor (0.2).",
                ),
                io.Int.Input(
                    "reuse_steps",
                    default=Policy.reuse_steps,
                    min=1,
                    max=50,
                    optional=True,
                    advanced=True,
                    tooltip="Steps that one choice of scores is reused for; 1 chooses anew in every "
                    "call. More saves planning time, most with tile_keys below 16, but costs memory, "
                    "and accuracy as the video changes from step to step.",
                ),
                io.Int.Input(
                    "reuse_memory_mb",
                    default=Policy.reuse_memory_mb,
                    min=0,
                    max=1_000_000,
                    optional=True,
                    advanced=True,
                    tooltip="Most GPU memory for what reuse_steps keeps, in MB. When it is full, the other "
                    "calls choose anew. Wan 14B at 720p, 81 frames, needs 1118 with tile_keys 16, "
                    "16 times as much with 1.",
                ),
                io.Boolean.Input(
                    "estimate_error",
                    default=Policy.estimate_error,
                    optional=True,
                    advanced=True,
                    tooltip="Computes 64 random query rows of one block in four densely and compares: the "
                    "estimated error on the node. Costs at most 0.5 % of dense attention; the picture is "
                    "the same with and without.",
                ),
                io.Boolean.Input(
                    "live",
                    default=False,
                    optional=True,
                    tooltip="While the model samples, moving threshold or warmup_steps acts from the next "
                    "step on, in the run that samples only: queued ones keep their values. The report "
                    "lists the values step by step.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "patched",
                    display_name="MODEL",
                    tooltip="The model with sparse attention; the input stays as it was.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, dense_blocks: str | None = "") -> bool | str:
        """Refuse what is wrong when the graph is queued; None comes through a link and is checked later.

        ComfyUI's server checks the other inputs against the schema. It reports what is refused here under
        the name of every argument of this function, so there is only one. Whether a method takes its
        parameter is found when the node runs, before anything is computed.
        """
        try:
            parse_blocks("" if dense_blocks is None else dense_blocks)
        except InvalidArgument as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model, live: bool = False, **inputs) -> io.NodeOutput:
        """Inputs that the page leaves out have the defaults of Settings and Policy."""
        settings, policy = chosen(inputs)
        check_boolean("live", live)
        return io.NodeOutput(Patch(settings, policy, own_id(cls), live).install(model))
