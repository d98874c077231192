"""Loading a model: what is wrong with the model told from what is wrong with this machine."""

import contextlib
import pickle
from collections.abc import Iterator

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


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
