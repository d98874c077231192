"""Visual Concept Fusion (docs/method.md): image aligner, fusion, and the pipeline that samples with them."""

import contextlib
import logging
from collections.abc import Iterator


def _is_no_hint(record: logging.LogRecord) -> bool:
    return "requires torchvision (not installed); falling back" not in record.getMessage()


# Importing diffusers without torchvision prints two hints to install it, which nothing here uses.
logging.getLogger("transformers.utils.import_utils").addFilter(_is_no_hint)


def quiet() -> None:
    """Turn off the loading bars and warnings of transformers and diffusers from now on. Downloads keep their bars."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    downloads_have_bars = not huggingface_hub.utils.are_progress_bars_disabled()
    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    if downloads_have_bars:
        huggingface_hub.utils.enable_progress_bars()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """As :func:`quiet`, as long as the block lasts, for a process that is not ours alone."""
    import diffusers.utils.logging
    import transformers.utils.logging

    both = (transformers.utils.logging, diffusers.utils.logging)
    before = [(each, each.get_verbosity(), each.is_progress_bar_enabled()) for each in both]
    quiet()
    try:
        yield
    finally:
        for library, verbosity, has_bars in before:
            library.set_verbosity(verbosity)
            if has_bars:
                library.enable_progress_bar()
