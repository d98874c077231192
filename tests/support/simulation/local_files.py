"""Local files behind the product's storage, each call of the operating system a request that may fail or wait.

The files are real ones in a temporary folder. :attr:`Store.objects` repeats what is there, for those who check.
"""

import builtins
import errno
import os
import shutil
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from support.simulation.object_store import REQUEST_SECONDS, Store
from vcf_batch.storage import local, reading, writing


@dataclass
class LocalFiles(Store):
    """A folder of a file system.

    Args:
        root: the real folder, empty.
        links: whether the file system has hard links.
    """

    root: str = ""
    links: bool = True

    def url(self, folder: str) -> str:
        return f"{self.root}/bucket/{folder}"

    @contextmanager
    def stands_in(self) -> Iterator[None]:
        """Let the product's storage go through the calls below, and its pauses through the simulated clock."""
        calls = _Calls(self)
        clock = types.SimpleNamespace(sleep=self.sleep, time=time.time)
        names = types.SimpleNamespace(uuid4=lambda: types.SimpleNamespace(hex=f"{self.draw.getrandbits(128):032x}"))
        files = types.SimpleNamespace(rmtree=calls.rmtree, copyfile=calls.copyfile)
        with pytest.MonkeyPatch.context() as patch:
            for module in (local, reading, writing):
                patch.setattr(module, "os", calls)
                patch.setattr(module, "open", calls.open_file, raising=False)
            for module in (local, reading):
                patch.setattr(module, "shutil", files)
            patch.setattr(local, "time", clock)
            patch.setattr(local, "uuid", names)
            yield
        on_disk = {key: data for key in _tree(self.root) if (data := _content(f"{self.root}/{key}")) is not None}
        assert _finished(on_disk) == _finished(self.objects), "what is checked is what is on the disk"


class _Calls:
    """What the product's storage uses of :mod:`os` and :mod:`shutil`. Paths outside of the folder are not looked at.

    Args:
        store: the folder.
    """

    def __init__(self, store: LocalFiles) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _key(self, path: Any) -> str | None:
        """Path below the folder; None if it does not lie there."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}").removesuffix(" (deleted)")
        root = self._store.root
        return os.path.relpath(path, root) if str(path).startswith(f"{root}/") else None

    def _ask(self, action: str, path: Any, effect: Callable[[], Any]) -> Any:
        key = self._key(path)
        return effect() if key is None else self._store.request(action, key, effect)

    def _written(self, action: str, path: str) -> None:
        """Repeat what is at a path now."""
        if (key := self._key(path)) is not None:
            self._store.write(action, key, _content(path))

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        def effect() -> int:
            key = self._key(path)
            try:
                descriptor = os.open(path, flags, mode)
            except FileNotFoundError:
                self._store.looked_at(str(key), None)
                raise
            if key is not None and not os.path.isdir(path):
                if flags & os.O_CREAT:
                    self._written("put", path)
                self._store.looked_at(key, _content(path))
            return descriptor

        return int(self._ask("open", path, effect))

    def open_file(self, path: str | int, mode: str = "r", *given: Any, **options: Any) -> Any:
        def effect() -> Any:
            file = builtins.open(path, mode, *given, **options)  # noqa: SIM115
            if "w" in mode and isinstance(path, str):
                self._written("put", path)
            return file

        return self._ask("write to" if "w" in mode else "read", path, effect)

    def fsync(self, descriptor: int) -> None:
        key = self._key(descriptor)
        if key is not None and key in self._store.objects:
            self._written("put", f"{self._store.root}/{key}")
        self._ask("flush", descriptor, lambda: None)

    def stat(self, path: str) -> os.stat_result:
        found: os.stat_result = self._ask("stat", path, lambda: os.stat(path))
        return found

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._ask("make", path, lambda: os.makedirs(path, exist_ok=exist_ok))

    def replace(self, source: str, target: str) -> None:
        def effect() -> None:
            os.replace(source, target)
            self._written("copy", target)
            self._written("delete", source)

        self._ask("rename", target, effect)

    def link(self, source: str, target: str) -> None:
        def effect() -> None:
            if not self._store.links:
                raise OSError(errno.EPERM, "no hard links", target)
            os.link(source, target)
            self._written("put", target)

        self._ask("link", target, effect)

    def unlink(self, path: str) -> None:
        def effect() -> None:
            os.unlink(path)
            self._written("delete", path)

        self._ask("delete", path, effect)

    @contextmanager
    def scandir(self, path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        entries: list[os.DirEntry[str]] = self._ask("list", path, lambda: sorted(os.scandir(path), key=_name))
        yield self._one_by_one(path, entries)

    def _one_by_one(self, path: str, entries: list[os.DirEntry[str]]) -> Iterator[os.DirEntry[str]]:
        for entry in entries:
            if self._key(path) is not None:
                self._store.sleep(REQUEST_SECONDS * self._store.draw.random() / 10)
            yield entry

    def walk(self, top: str, onerror: Callable[[OSError], object]) -> Iterator[tuple[str, list[str], list[str]]]:
        yield from self._ask("list", top, lambda: [*os.walk(top, onerror=onerror)])

    def rmtree(self, top: str) -> None:
        if self._key(top) is None:
            shutil.rmtree(top)
            return
        for folder, _, files in self._ask("list", top, lambda: [*os.walk(top, onerror=_raise, topdown=False)]):
            for file in sorted(files):
                self.unlink(os.path.join(folder, file))
            self._ask("delete", folder, lambda folder=folder: os.rmdir(folder))  # type: ignore[misc]

    def copyfile(self, source: str, target: str) -> None:
        self._ask("read", source, lambda: shutil.copyfile(source, target))


def _finished(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files, without the content of temporary ones. How much of it a writer that dies leaves there is chance."""
    return {key: b"" if os.path.basename(key).startswith(local._TEMPORARY) else files[key] for key in files}


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name


def _content(path: str) -> bytes | None:
    try:
        with builtins.open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _tree(top: str) -> Iterator[str]:
    for folder, _, files in os.walk(top):
        yield from (os.path.relpath(os.path.join(folder, file), top) for file in files)


def _raise(error: OSError) -> None:
    raise error
