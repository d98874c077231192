"""Silence the loading messages of transformers and diffusers, which do not help the user of a command."""

import diffusers.utils.logging
import huggingface_hub.utils
import transformers.utils.logging


def quiet() -> None:
    """Turn off loading bars and warnings (such as a missing torchvision) from now on. Downloads keep their bars."""
    downloads_have_bars = not huggingface_hub.utils.are_progress_bars_disabled()
    for logging in (transformers.utils.logging, diffusers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if downloads_have_bars:
        huggingface_hub.utils.enable_progress_bars()
