"""Functions that split and join paths and URLs; none accesses a storage."""

import os


def is_local(url: str) -> bool:
    """Whether ``url`` is a path or a ``file://`` URL."""
    return "://" not in url or url.startswith("file://")


def is_s3(url: str) -> bool:
    """Whether ``url`` is on S3, or on a storage that speaks its language."""
    return url.startswith(("s3://", "s3a://"))


def absolute(url: str) -> str:
    """The absolute path of a local ``url`` (``~`` is expanded); other URLs unchanged."""
    return os.path.abspath(os.path.expanduser(as_local_path(url))) if is_local(url) else url


def join(base: str, *names: str) -> str:
    """``base`` and relative ``names`` with single slashes between them."""
    root, path = _split(base)
    parts = [path.rstrip("/"), *(part.strip("/") for part in names)]
    joined = "/".join(part for part in parts if part)
    return root + ("/" + joined.lstrip("/") if path.startswith("/") else joined)


def parent(url: str) -> str:
    """The folder that holds ``url``. The parent of a bucket or a root is itself."""
    root, path = _split(url)
    folder, slash, _ = path.rstrip("/").rpartition("/")
    if slash:
        return root + (folder or "/")
    return url if root or path.startswith("/") else "."


def name(url: str) -> str:
    """The last component of ``url``."""
    return _split(url)[1].rstrip("/").rpartition("/")[2]


def _split(url: str) -> tuple[str, str]:
    """The ``scheme://`` of a URL (empty for a path), and the rest."""
    scheme, separator, rest = url.partition("://")
    return (scheme + separator, rest) if separator else ("", url)


def as_local_path(url: str) -> str:
    return url.removeprefix("file://")
