"""What a model tells us about an attention call: the token grid and the block it belongs to."""

import math

from ..fgattn.order import TokenLayout


def call_layout(options: dict, query_length: int, key_length: int) -> TokenLayout | str:
    """Layout of a self-attention call over the video tokens, or why it is none.

    Args:
        options: the call's `transformer_options`; Wan models set `grid_sizes`.
    """
    if query_length != key_length:
        return "cross-attention"
    grid = options.get("grid_sizes")
    if grid is None:
        return "this model does not report its token grid"
    grid = tuple(int(n) for n in grid)
    if query_length != math.prod(grid):
        return f"{query_length} tokens, but the video grid has {math.prod(grid)}"
    return TokenLayout(grid)


def call_block(options: dict) -> int | None:
    """Number of the transformer block that calls, if the model reports it."""
    return options.get("block_index")
