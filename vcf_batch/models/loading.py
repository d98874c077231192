"""Loading a model: which errors are the model's fault, and which are this machine's."""

import contextlib
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

from vcf_batch.errors import ModelError, StorageError, VcfBatchError


@contextlib.contextmanager
def load_errors(what: str, remedy: str = "") -> Iterator[None]:
    """Tell what is wrong with a model from what is wrong with this machine: loaders have no common error type.

    Args:
        what: what is loaded, for the message.
        remedy: a sentence about what else to use, beginning with ". ".

    Raises:
        ModelError: a part is missing or does not fit.
        StorageError: the disk failed.
        MemoryError: as it came.
    """
    try:
        yield
    except (VcfBatchError, MemoryError):
        raise
    except Exception as error:
        # Loaders report what a model lacks as an OSError without a number.
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            raise StorageError(f"cannot read {what} on this node: {error}") from error
        reason: object = error
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
