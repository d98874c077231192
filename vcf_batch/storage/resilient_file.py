"""A file for reading that is reopened after a failure and continues at the same position."""

import contextlib
import io
import os
from collections.abc import Callable
from typing import Any

from vcf_batch.storage.retries import Result, retried


class ResilientFile(io.RawIOBase):
    """The file object of :func:`vcf_batch.storage.open_read`. Its errors are those of :mod:`vcf_batch.storage`.

    A file that ends before its announced size has failed, too, and is reopened.

    Args:
        url: the file's URL, for error messages.
        open_file: function that opens the file at its beginning.
    """

    def __init__(self, url: str, open_file: Callable[[], Any]) -> None:
        self._url, self._open_file = url, open_file
        self._position = 0
        self._file = retried("open", url, open_file)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._do(lambda file: bool(file.seekable()))

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._do(lambda file: _read(file, None if size is None or size < 0 else size))
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._position = self._do(lambda file: int(file.seek(offset, whence)))
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        if not self.closed and self._file is not None:
            with contextlib.suppress(Exception):  # What was read is read.
                self._file.close()
        super().close()

    def _do(self, call: Callable[[Any], Result]) -> Result:
        def on_an_open_file() -> Result:
            if self._file is None:
                self._file = self._reopened()
            try:
                return call(self._file)
            except Exception:
                broken, self._file = self._file, None
                with contextlib.suppress(Exception):
                    broken.close()
                raise

        return retried("read", self._url, on_an_open_file)

    def _reopened(self) -> Any:
        file = retried("open", self._url, self._open_file)
        if file.seekable():
            file.seek(self._position)
        else:
            _read(file, self._position)
        return file


def _read(file: Any, count: int | None) -> bytes:
    """Read ``count`` bytes, or all if None. A streamed web file may return less than asked for before its end.

    Raises:
        ConnectionError: the file ends before its announced size.
    """
    size = getattr(file, "size", None)
    if size is not None:
        left = max(size - file.tell(), 0)
        count = left if count is None else min(count, left)
    chunks: list[bytes] = []
    while count is None or count > 0:
        chunk = file.read(-1 if count is None else count)
        if not chunk:
            break
        chunks.append(chunk)
        count = None if count is None else count - len(chunk)
    if count and size is not None:
        raise ConnectionError(f"{size - count} of {size} bytes arrived")
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
