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
    ├── NodeError                  1   a node cannot compute as the run requires: others go on
    ├── OutOfDeviceMemory          1   a batch does not fit into the GPU's memory: the attempt fails
    └── RowError                   -   one row cannot be generated: goes into its error_message, never into an exit code

    Interrupted                  130   Ctrl-C
                                 143   SIGTERM: stopped by the cluster

A message gives the value, the limit and the remedy; the command line prints it without a traceback. Values may come
from anyone, and messages go to terminals, logs and published outputs. So secrets are removed from messages, and
characters that would move a cursor or reverse the text are escaped.
"""

import itertools
import re

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30})://")
_SPACE, _PORT = re.compile(r"\s"), re.compile(r"\d+/")
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "memory", "hf"})
_FILES = frozenset({"file", "local", "ftp", "ftps", "sftp", "ssh", "hdfs", "smb"})
"""Schemes whose names are paths: they know no queries."""
# A quotation mark ends an address, unless the address goes on behind it.
_WORD = re.compile(r"(?:[^\s'\"]|['\"](?=\w))+")
_WORDS = re.compile(r"(?:[^\n'\"]|['\"](?=\w))*")
# What begins a query, a fragment or a parameter of a path: written out, or encoded once or more.
_MARK = re.compile(r"[?#;]|%(?:25)*(?:3F|23|3B)", re.IGNORECASE)
_QUERY = re.compile(r"\?|%(?:25)*3F", re.IGNORECASE)
# Names of parameters that hold secrets, as presigned addresses and services have them.
_SECRET = re.compile(
    r"(?:sig|token|secret|key|pass|pwd|auth|cred|session|jwt|ticket|policy|expires|x-amz|x-goog|accessid)"
    r"[\w.-]{0,40}(?:=|%(?:25)*3D)",
    re.IGNORECASE,
)
_PRESIGNED = re.compile(r"X-[a-z]{2,8}-(?:Signature|Credential|Security-Token)(?:=|%(?:25)*3D)", re.IGNORECASE)
_SESSION = re.compile(r"(;jsessionid=)(?:[^\s'\"]|['\"](?=\w))+", re.IGNORECASE)


def redact_name(name: str, is_web: bool = False) -> str:
    """One path or URL without its secrets, and otherwise whole, so that different names stay different.

    Passwords are removed from every URL; queries, fragments and parameters of paths from http and https, and from
    schemes that are not known. Anywhere else they are part of the name, unless they are those of a presigned address.

    Args:
        name: nothing but a path or a URL.
        is_web: whether a name without a scheme is one of a web server.
    """
    text = _without_users(name)
    begin = 0
    if (not is_web or _SCHEME.match(text)) and not _PRESIGNED.search(text):
        strict = (each for each in _SCHEME.finditer(text) if each[1].lower() not in _OBJECT_STORES | _FILES)
        begin = next((each.end() for each in strict), len(text))
    found = _MARK.search(text, begin)
    return text[: found.end()] + "..." if found and found.end() < len(text) else text


def redact(text: str) -> str:
    """``text`` without the secrets of every URL in it: user names, passwords, queries, fragments, parameters of paths.

    Names of object stores may have ``?``, ``#`` and ``;`` in them. There, what follows is removed only if it has a
    parameter that is named like a secret, as ``sig=``. Names of local files keep theirs: of them, and of relative ones,
    only a query with such a parameter is removed. Where nothing but a name is shown, :func:`redact_name` is exact.
    """
    # References may be relative, and libraries often name the path alone.
    text = _SESSION.sub(r"\1...", _cut(_without_users(text), _QUERY, bare=False))
    done: list[str] = []
    at, strict = 0, False
    addresses = [*_SCHEME.finditer(text)]
    for address, following in itertools.zip_longest(addresses, addresses[1:]):
        scheme = address[1].lower()
        goes_on = strict and at == address.start() and not (done and _SPACE.search(done[-1]))
        strict = goes_on or scheme not in _OBJECT_STORES | _FILES
        done.append(text[at : address.end()])
        words = _WORDS.match(text, address.end(), following.start() if following else len(text))
        assert words
        at = words.end()
        done.append(words[0] if scheme in _FILES and not strict else _cut(words[0], _MARK, bare=strict))
    return "".join(done) + text[at:]


def _cut(text: str, mark: re.Pattern[str], bare: bool) -> str:
    """``text`` with each of its words cut off behind the first mark.

    Args:
        text: words between spaces.
        mark: what may begin a secret.
        bare: whether a secret may have any name, or none.
    """

    def shortened(word: re.Match[str]) -> str:
        found = mark.search(word[0])
        if not found or not (found.end() < len(word[0]) if bare else _SECRET.search(word[0], found.end())):
            return word[0]
        return word[0][: found.end()] + "..."

    return _WORD.sub(shortened, text)


def _without_users(text: str) -> str:
    done: list[str] = []
    at = stop = last = 0
    for address in _SCHEME.finditer(text):
        begin = address.end()
        if begin > stop:
            space = _SPACE.search(text, begin)
            stop = space.start() if space else len(text)
            last = _behind_user(text, begin, stop)
        if begin <= at:
            continue
        slash = text.find("/", begin, stop)
        host = slash if slash >= 0 else stop
        user = _behind_user(text, begin, host)
        # A password may contain slashes, although no URL allows that. A port and a path are not a password.
        colon = text.find(":", begin, host)
        if not user and colon >= 0 and not _PORT.match(text, colon + 1):
            user = last
        if user > begin:
            done.append(text[at:begin])
            at = user
    return "".join(done) + text[at:]


def _behind_user(text: str, begin: int, stop: int) -> int:
    """Place behind the last ``@`` in a part of ``text``, written out or encoded; 0 if there is none."""
    return max((text.rfind(at, begin, stop) + len(at)) * (at in text[begin:stop]) for at in ("@", "%40", "%2540"))


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


class NodeError(VcfBatchError):
    """This node cannot compute as the run requires. Another node may: the run goes on there, or ends if none does."""


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
