"""FG-Attn: fine-grained sparse attention for video models in ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI; imports late, so that the library and its tests need no ComfyUI."""
    import logging

    try:
        from .nodes import FGAttnExtension
    except Exception:
        logging.getLogger("fgattn").exception("FG-Attn could not be loaded")  # ComfyUI drops the traceback
        raise
    return FGAttnExtension()
