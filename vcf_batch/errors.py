"""All errors, and the exit code of a command that ends with each.

::

    VcfBatchError                  1   something the project raises on purpose
    ├── UsageError                 2   an option or a configuration file is wrong
    │   ├── ManifestError          2   the manifest breaks its contract
    │   └── ModelError             2   the model cannot be resolved or loaded
    ├── TooManyFailedRows          3   the run is done, but more rows failed than --max-failed allows
    ├── RefusedError               4   the output belongs to another run
    ├── DamageFound                5   verify, push or another reader found files that do not match their receipts
    ├── Unfinished                 6   nothing is damaged, but shards are left: the run's own command goes on
    ├── StorageError               1   the storage failed: the attempt fails, never the row
    ├── OutOfDeviceMemory          1   a batch does not fit into the GPU's memory: the attempt fails
    └── RowError                   -   one row cannot be generated: goes into its error_message, never into an exit code

    Interrupted                  130   Ctrl-C
                                 143   SIGTERM: stopped by the cluster

A message gives the value, the limit and the remedy; the command line prints it without a traceback. Values may come
from anyone, and messages go to terminals, logs and published outputs. So secrets are removed from messages, and
characters that would move a cursor or reverse the text are escaped.
"""

import re


def redact(text: str) -> str:
    """``text`` with user names, passwords and query strings (signatures, tokens) removed from every URL in it."""
    # A password may contain slashes, although no URL allows that. A port and a path are not a password.
    text = re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s/]*|[^\s/:]*:(?!\d+/)\S*)@", r"\1", text)
    # Query strings are removed without a URL, too: references may be relative, and libraries often name the path alone.
    return re.sub(r"\?[^\s'\"]*=[^\s'\"]*", "?...", text)


def printable(text: str) -> str:
    """``text`` without secrets, and with control characters other than line breaks escaped, for a message."""
    # Storage drivers name a bucket or a path without its scheme, so a password may stand there, too.
    text = re.sub(r"(?<![^\s/'\"=(])[^\s/:@'\"]+:[^\s/@'\"]+@(?=\w)", "", redact(text))
    return "".join(
        character if character.isprintable() or character == "\n" else character.encode("unicode_escape").decode()
        for character in text
    )


class VcfBatchError(Exception):
    """Base of every error that vcf-batch raises on purpose. Its message is :func:`printable`."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UsageError(VcfBatchError, ValueError):
    """An option or a configuration file is wrong."""

    exit_code = 2


class ManifestError(UsageError):
    """The manifest breaks its contract (see manifests/README.md)."""


class ModelError(UsageError):
    """The model cannot be resolved, or a part of it is missing or unsafe to load."""


class TooManyFailedRows(VcfBatchError):
    """The run is done, but a larger fraction of its rows failed than was allowed."""

    exit_code = 3


class RefusedError(VcfBatchError):
    """The output holds another run's data, or another run is writing it."""

    exit_code = 4


class DamageFound(VcfBatchError):
    """Outputs do not match their receipts."""

    exit_code = 5


class Unfinished(VcfBatchError):
    """Nothing is damaged, but shards of the run are not generated yet. The same command goes on."""

    exit_code = 6


class StorageError(VcfBatchError):
    """Storage or network failed. The shard gets another attempt; no row is blamed."""


class OutOfDeviceMemory(VcfBatchError):
    """A batch does not fit into the GPU's memory. The shard gets another attempt in a fresh process."""


class RowError(VcfBatchError):
    """One row cannot be generated. The message becomes the row's ``error_message``."""


class Interrupted(BaseException):
    """The run was told to stop. What is committed stays; the same command resumes.

    It is not an Exception, so that no handler of failures catches it.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number
