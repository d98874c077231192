"""Files of keys: the rows that ``export --exclude`` leaves out, and that ``repair --keys`` generates again."""

from vcf_batch import storage
from vcf_batch.errors import UsageError, redact

MAX_KEYS_BYTES = 1 << 30
"""Largest size of such a file. Its keys are held in memory."""


def read(option: str, url: str) -> frozenset[str]:
    """The keys in a text file with a key on each line.

    Args:
        option: the option that names the file, for error messages.
        url: the file.

    Raises:
        UsageError: the file cannot be read, is too large, or has no key.
    """
    try:
        data = storage.read_bytes(url, limit=MAX_KEYS_BYTES + 1)
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{option} {redact(url)} cannot be read: {error}. Give a text file with a key on each line"
        ) from error
    if len(data) > MAX_KEYS_BYTES:
        raise UsageError(f"{option} {redact(url)} has more than {MAX_KEYS_BYTES:,} bytes; use --where instead")
    keys = frozenset(line.strip() for line in text.splitlines() if line.strip())
    if not keys:
        raise UsageError(f"{option} {redact(url)} has no key; give a key on each line, or leave the option out")
    return keys
