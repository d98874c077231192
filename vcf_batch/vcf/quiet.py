"""Silence for what transformers and diffusers tell while they load: it concerns nobody who runs a command."""

import diffusers.utils.logging
import huggingface_hub.utils
import transformers.utils.logging


def quiet() -> None:
    """From here on neither bars of loading nor warnings, such as that torchvision is missing. Downloads keep bars."""
    downloads_tell = not huggingface_hub.utils.are_progress_bars_disabled()
    for logging in (transformers.utils.logging, diffusers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if downloads_tell:
        huggingface_hub.utils.enable_progress_bars()
