"""Storage as Arrow sees it, for a library that keeps files of its own."""

from typing import Any

from vcf_batch.storage.drivers import filesystem
from vcf_batch.storage.paths import absolute, is_local


def arrow_filesystem(url: str) -> tuple[Any, str]:
    """Arrow's view of the storage, with this module's drivers and options, and the path of ``url`` in it.

    Raises:
        UsageError: see the module.
    """
    import pyarrow.fs  # nothing else here needs it

    if is_local(url):
        return pyarrow.fs.LocalFileSystem(), absolute(url)
    fs, path = filesystem(url)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), path
