"""Errors of loading a model: faults of the model told apart from faults of this machine."""

import contextlib
import errno
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

from vcf_batch.errors import ModelError, StorageError, VcfBatchError


@contextlib.contextmanager
def load_errors(what: str, remedy: str = "") -> Iterator[None]:
    """Turn errors in the block into a ModelError or a StorageError: loaders have no common error type.

    Args:
        what: name of the model or part, for the message.
        remedy: a sentence with a remedy, beginning with ". ".

    Raises:
        ModelError: a part is missing or does not fit.
        StorageError: the disk failed.
        MemoryError: memory ran out; passed on unchanged.
    """
    try:
        yield
    except (VcfBatchError, MemoryError):
        raise
    except Exception as error:
        # Loaders report a missing part of a model as an OSError without errno.
        # A file that is cut short makes some of them seek to an impossible place.
        cut_short = isinstance(error, OSError) and error.errno == errno.EINVAL
        if isinstance(error, OSError) and error.errno and not cut_short and not isinstance(error, FileNotFoundError):
            raise StorageError(f"cannot read {what} on this node: {error}") from error
        reason = str(error).strip() or type(error).__name__
        if cut_short:
            reason = "a file of it is damaged or cut short: copy it again"
        if any(isinstance(cause, pickle.UnpicklingError) for cause in _causes(error)):
            reason = "a .bin file of it is damaged, or a pickle of more than weights; nothing in it was run"
        raise ModelError(f"cannot load {what}: {reason}{remedy}") from error


def refuse_missing_weights(report: Mapping[str, Any], what: str, remedy: str) -> None:
    """Refuse a model whose files lack weights: transformers would fill them with random ones.

    Args:
        report: what ``from_pretrained`` of transformers returns beside the model with ``output_loading_info=True``.
        what: what was loaded, for the message.
        remedy: what to do about it, after a semicolon.

    Raises:
        ModelError: weights are missing; with their number and the name of one.
    """
    if missing := report["missing_keys"]:
        raise ModelError(f"{what} lacks {len(missing)} weights, among them {min(missing)}; {remedy}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
