"""What the inputs of the node "FG-Attn Sparse Attention" may be, and what they choose."""

import dataclasses
from collections.abc import Callable
from typing import Any

from ..fgattn.settings import TILE_KEYS, TILE_QUERIES, Policy, Settings, parse_blocks

MOST_THRESHOLD, MOST_PARAMETER, MOST_WARMUP = 8.0, 8.0, 50
OPTIONS = {str(number) for number in (*TILE_QUERIES, *TILE_KEYS)}


def _tile(text: Any) -> Any:
    """The number that an entry of a list has; anything else as it is, for the settings to refuse."""
    return int(text) if isinstance(text, str) and text in OPTIONS else text


READ: dict[str, Callable[[Any], Any]] = {
    "tile_queries": _tile,
    "tile_keys": _tile,
    "dense_blocks": parse_blocks,
}  # from what the page has to a field


class Most(float):
    """A largest value that NaN is above, too: ComfyUI asks `value > most`, and reports the input."""

    def __lt__(self, value: float) -> bool:
        return not value <= float(self)


def chosen(inputs: dict[str, Any]) -> tuple[Settings, Policy]:
    """What the inputs of the node choose; each has the name of a field.

    Raises:
        InvalidArgument: for values that the settings do not take.
        TypeError: for names that are no field.
    """
    values = {name: READ[name](value) if name in READ else value for name, value in inputs.items()}
    own = {field.name for field in dataclasses.fields(Settings)}
    return (
        Settings(**{name: value for name, value in values.items() if name in own}),
        Policy(**{name: value for name, value in values.items() if name not in own}),
    )
