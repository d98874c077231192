"""Silence the loading messages of transformers and diffusers, which do not help the user of a command."""

import contextlib
from collections.abc import Iterator

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


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """As :func:`quiet`, as long as the block lasts, for a process that is not ours alone."""
    both = (transformers.utils.logging, diffusers.utils.logging)
    before = [(each, each.get_verbosity(), each.is_progress_bar_enabled()) for each in both]
    quiet()
    try:
        yield
    finally:
        for logging, verbosity, has_bars in before:
            logging.set_verbosity(verbosity)
            if has_bars:
                logging.enable_progress_bar()
