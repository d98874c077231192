"""An object store in memory, with the semantics of S3 and the faults of a network. It stands in for ``s3://``.

Objects are created once or replaced, in one request; there is no rename and there are no folders. An answer may be lost
although the request had its effect. An effect may come late, after requests that were sent after it. A listing may show
the objects as they were a while ago.
"""

import hashlib
import io
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import fsspec.asyn
import pytest
from fsspec.registry import _registry
from fsspec.spec import AbstractFileSystem

Strike = Literal["lost", "refused", "done and refused", "late"]
"""What happens to one request: its answer is lost; it fails for good, without its effect or with it; it gets no answer,
and has its effect after those that were sent later."""


@dataclass
class Trouble:
    """How often requests fail, as shares of 1."""

    fails: float = 0.0
    """Without an effect."""
    lost: float = 0.0
    """With its effect, and without an answer."""
    slow: float = 0.0
    """Hangs for :data:`SLOW_SECONDS`, then fails without an effect."""
    late: float = 0.0
    """Hangs as long, fails, and has its effect even later."""


SLOW_SECONDS = 20.0
"""Seconds until a request is given up that gets no answer."""
LATE_SECONDS = 3.0
"""Seconds after that until the effect of a struck request: those that are sent instead come first."""
REQUEST_SECONDS = 0.05


@dataclass
class Written:
    """A change of the store, for those who check."""

    time: float
    group: str
    thread: int
    action: str
    key: str
    data: bytes | None


class Objects(dict[str, bytes]):
    """Objects by key. What lies directly below a prefix is found without a look at all others."""

    def __init__(self) -> None:
        super().__init__()
        self.below: dict[str, set[str]] = {}
        """Names directly below each prefix."""

    def put(self, key: str, data: bytes) -> None:
        """Create an object, or replace it."""
        self[key] = data
        while True:
            prefix, _, name = key.rpartition("/")
            names = self.below.setdefault(prefix, set())
            if name in names or not name:
                return
            names.add(name)
            key = prefix

    def delete(self, key: str) -> None:
        """Delete an object, if it is there."""
        self.pop(key, None)
        while key and key not in self and key not in self.below:
            prefix, _, name = key.rpartition("/")
            names = self.below.get(prefix, set())
            names.discard(name)
            if names:
                return
            self.below.pop(prefix, None)
            key = prefix

    def change(self, key: str, data: bytes | None) -> None:
        """Put an object, or delete it."""
        if data is None:
            self.delete(key)
        else:
            self.put(key, data)

    def entry(self, key: str) -> dict[str, Any]:
        """What a listing tells of an object, or of a folder."""
        if key in self.below:
            return {"name": key, "size": 0, "type": "directory"}
        return {"name": key, "size": len(self[key]), "type": "file", "ETag": _etag(self[key])}


@dataclass
class Store:
    """Objects by key, and what happens to requests."""

    draw: random.Random
    sleep: Callable[[float], None]
    now: Callable[[], float]
    who: Callable[[], tuple[str, int]]
    """Names the group and the thread that sends a request."""
    later: Callable[[float, Callable[[], None]], None]
    """Lets something happen after some seconds."""
    objects: Objects = field(default_factory=Objects)
    trouble: Trouble = field(default_factory=Trouble)
    down: bool = False
    """Whether no request gets through."""
    if_match: bool = True
    """Whether deletes with ``If-Match`` compare, as on S3; some stores ignore the condition."""
    if_none_match: bool = True
    """Whether what is created with ``If-None-Match`` replaces nothing, as on S3; some stores ignore the condition."""
    stale_seconds: float = 0.0
    """Largest age of what a listing shows. A read shows what is there."""
    written: list[Written] = field(default_factory=list)
    watcher: Callable[[Written], None] = lambda written: None
    looked_at: Callable[[str, bytes | None], None] = lambda key, data: None
    """Called with each object that was read, None where there is none."""
    numbered: Callable[[str, str], Strike | None] = lambda action, key: None
    """Called before each request; gives what happens to it, if that is not left to chance."""

    def request(self, action: str, key: str, effect: Callable[[], Any]) -> Any:
        """Carry out a request, or let it fail."""
        strike = self.numbered(action, key)
        self.sleep(REQUEST_SECONDS * self.draw.random())
        if strike == "refused":
            raise PermissionError(f"{action} {key}: refused")
        if strike == "late":
            self.sleep(SLOW_SECONDS)
            self.later(LATE_SECONDS, effect)
            raise TimeoutError(f"{action} {key}: no answer")
        if strike is not None:
            effect()
            raise (ConnectionError if strike == "lost" else PermissionError)(f"{action} {key}: {strike}")
        if self.down:
            raise ConnectionError(f"{action} {key}: no connection")
        trouble = self.trouble
        shares = (trouble.fails, trouble.lost, trouble.slow, trouble.late)
        kind = self.draw.choices(range(5), [*shares, 1 - sum(shares)])[0]
        if kind == 0:
            raise ConnectionError(f"{action} {key}: no connection")
        if kind in (2, 3):
            self.sleep(SLOW_SECONDS)
            if kind == 3 and action in ("put", "delete"):
                self.later(self.draw.random() * SLOW_SECONDS, effect)
            raise TimeoutError(f"{action} {key}: no answer")
        result = effect()
        if kind == 1:
            raise ConnectionError(f"{action} {key}: the answer is lost")
        return result

    def url(self, folder: str) -> str:
        """URL of a folder in this store."""
        return f"s3://bucket/{folder}"

    @contextmanager
    def stands_in(self) -> Iterator[None]:
        """Let this store stand behind ``s3://`` in this process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(_registry, "s3", SimulatedS3)
            patch.setattr(SimulatedS3, "store", self, raising=False)
            SimulatedS3.clear_instance_cache()
            yield
            SimulatedS3.clear_instance_cache()

    def listed(self) -> Objects:
        """The objects as a listing shows them."""
        if not self.stale_seconds:
            return self.objects
        shown = Objects()
        until = self.now() - self.stale_seconds * self.draw.random()
        for written in itertools.takewhile(lambda written: written.time <= until, self.written):
            shown.change(written.key, written.data)
        return shown

    def write(self, action: str, key: str, data: bytes | None) -> None:
        """Put an object, or delete it."""
        self.objects.change(key, data)
        self.written.append(Written(self.now(), *self.who(), action, key, data))
        self.watcher(self.written[-1])


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@dataclass
class Body:
    """The content of an answer."""

    content: bytes

    async def read(self) -> bytes:
        return self.content


class SimulatedS3(AbstractFileSystem):
    """The driver of ``s3://`` that the product's storage uses. One store at a time stands behind it."""

    protocol = "s3"
    cachable = True
    store: Store

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("s3://").rstrip("/")

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None

    def invalidate_cache(self, path: str | None = None) -> None:
        pass

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        key = self._strip_protocol(path)

        def effect() -> dict[str, Any]:
            if (data := self.store.objects.get(key)) is not None:
                return {"name": key, "size": len(data), "type": "file", "ETag": _etag(data)}
            if key in self.store.objects.below:
                return {"name": key, "size": 0, "type": "directory"}
            raise FileNotFoundError(key)

        return self.store.request("info", key, effect)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        key = self._strip_protocol(path)

        def effect() -> list[Any]:
            objects = self.store.listed()
            if key not in objects.below:
                raise FileNotFoundError(key)
            return [objects.entry(f"{key}/{name}") for name in sorted(objects.below[key])]

        return self.store.request("ls", key, effect)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        assert mode == "rb", "objects are written in one request"
        return io.BytesIO(self._get("open", path))

    def _get(self, action: str, path: str) -> bytes:
        key = self._strip_protocol(path)

        def effect() -> bytes:
            data = self.store.objects.get(key)
            self.store.looked_at(key, data)
            if data is None:
                raise FileNotFoundError(key)
            return data

        return self.store.request(action, key, effect)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        key = self._strip_protocol(path)

        def effect() -> None:
            if mode == "create" and key in self.store.objects:
                if self.store.if_none_match:
                    raise FileExistsError(key)
                if self.store.objects[key] == value:
                    return  # a request that was sent again
            self.store.write("put", key, value)

        self.store.request("put", key, effect)

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)

        def effect() -> None:
            if source not in self.store.objects:
                raise FileNotFoundError(source)
            self.store.write("copy", target, self.store.objects[source])

        self.store.request("copy", target, effect)

    def rm_file(self, path: str) -> None:
        key = self._strip_protocol(path)
        self.store.request("delete", key, lambda: self.store.write("delete", key, None))

    @property
    def loop(self) -> Any:
        return fsspec.asyn.get_loop()

    def call_s3(self, method: str, Bucket: str, Key: str, IfMatch: str = "", Range: str = "") -> dict[str, Any]:
        key = f"{Bucket}/{Key}"
        if method == "get_object":
            data = self._get("cat", key)
            return {"Body": Body(data[: int(Range.rpartition("-")[2]) + 1] if Range else data)}
        assert method == "delete_object"

        def effect() -> None:
            data = self.store.objects.get(key)
            if data is None:
                raise FileNotFoundError(key)
            if self.store.if_match and _etag(data) != IfMatch:
                raise FileExistsError(key)  # s3fs raises it for status 412
            self.store.write("delete", key, None)

        self.store.request("delete", key, effect)
        return {}
