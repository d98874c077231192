"""The Arrow filesystem of a URL, for libraries that write files themselves."""

from typing import Any

from vcf_batch.storage.drivers import filesystem
from vcf_batch.storage.paths import absolute, is_local


def arrow_filesystem(url: str) -> tuple[Any, str]:
    """The Arrow filesystem that holds ``url``, with this package's drivers and options, and the path of ``url`` in it.

    Raises:
        UsageError: no fsspec driver is installed for the URL's protocol.
    """
    import pyarrow.fs  # imported late: only this function needs it

    if is_local(url):
        return pyarrow.fs.LocalFileSystem(), absolute(url)
    fs, path = filesystem(url)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), path
