"""Reports as the page shows them, drawn when the render is done: a failure costs the picture alone."""

import logging
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from comfy_api.latest import ui
from PIL import Image

T = TypeVar("T")
BLANK = Image.new("RGB", (64, 64))
log = logging.getLogger("fgattn")


def guarded(make: Callable[[], T], otherwise: Callable[[str], T]) -> T:
    """What `make` gives, or, after a failure, what `otherwise` gives for its text."""
    try:
        return make()
    except Exception as error:
        log.exception("FG-Attn could not draw a report; the render is not touched")
        return otherwise(f"FG-Attn could not draw this: {type(error).__name__}: {error}")


def tensor(image: Image.Image) -> torch.Tensor:
    """[1, height, width, 3], as ComfyUI has images."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255)[None]


def preview(node: type, image: Image.Image, text: str) -> dict:
    """A picture and text on the node; text alone where the picture cannot be saved."""
    words = ui.PreviewText(text).as_dict()
    return guarded(lambda: ui.PreviewImage(tensor(image), cls=node).as_dict() | words, lambda _: words)
