"""Which references may be read, what happens to those that cannot, and that nothing is blamed on the wrong party."""

import contextlib
import dataclasses
import hashlib
import io
import os
import pickle
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from support import web
from vcf_batch.errors import RowError, StorageError, UsageError
from vcf_batch.manifest import references, web_reading
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.records import Reference

LIMIT = 1_000_000


def png(colour: tuple[int, int, int] = (200, 10, 10), size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def pixel(image: Image.Image) -> tuple[int, ...]:
    return tuple(int(value) for value in np.asarray(image)[0, 0])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "manifest"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "a.png").write_bytes(png())
    (folder / "refs" / "sp ace é::.png").write_bytes(png())
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "b.png").write_bytes(png((0, 0, 255)))
    (tmp_path / "manifest-private").mkdir()
    (tmp_path / "manifest-private" / "c.png").write_bytes(png())
    return folder


def reader(base: object, *roots: object, max_pixels: int = LIMIT) -> ReferenceReader:
    return ReferenceReader(str(base), [str(root) for root in roots], max_pixels)


@pytest.mark.parametrize(
    "uri",
    ["refs/a.png", "./refs/../refs/a.png", "{base}/refs/a.png", "file://{base}/refs/a.png", "refs/sp ace é::.png"],
)
def test_local_references_under_the_manifests_folder(base: Path, uri: str) -> None:
    reference = Reference(uri=uri.format(base=base))
    assert reader(base).policy_error(reference) is None
    image = reader(base).read(reference)
    assert (image.mode, image.size, pixel(image)) == ("RGB", (6, 4), (200, 10, 10))


@pytest.mark.parametrize(
    "uri",
    [
        "../outside/b.png",
        "refs/../../outside/b.png",
        "../manifest-private/c.png",
        "{outside}/b.png",
        "file://{outside}/b.png",
        "/etc/passwd",
        "//etc/passwd",
        "link/b.png",
        "link.png",
        "http://127.0.0.1:9/x.png",
        "https://example.org/x.png",
        "s3://bucket/x.png",
        "memory://bucket/x.png",
        "ftp://example.org/x.png",
        "zip://x.png::http://127.0.0.1:9/x.zip",
        "simplecache::memory://bucket/x.png",
    ],
)
def test_references_elsewhere_are_refused_without_a_look(base: Path, tmp_path: Path, uri: str) -> None:
    """References may live under the manifest's own folder or under named roots; a row outside fails alone."""
    (base / "link").symlink_to(tmp_path / "outside")
    (base / "link.png").symlink_to(tmp_path / "outside" / "b.png")
    reference = Reference(uri=uri.format(outside=tmp_path / "outside"))
    if "simplecache" in uri:  # no scheme of its own: a relative path that does not exist
        with pytest.raises(RowError, match="does not exist"):
            reader(base).read(reference)
        return
    policy = reader(base).policy_error(reference)
    assert policy is not None
    with pytest.raises(RowError) as caught:
        reader(base).read(reference)
    assert str(caught.value) == policy
    if "::" not in uri:
        assert "--reference-root" in policy
        assert str(base) in policy
        assert str(reference.uri) in policy


def test_a_root_allows_what_lies_under_it(base: Path, tmp_path: Path) -> None:
    (base / "link").symlink_to(tmp_path / "outside")
    both = reader(base, tmp_path / "outside/")
    for uri in ("../outside/b.png", "link/b.png", str(tmp_path / "outside" / "b.png"), "refs/a.png"):
        assert both.policy_error(Reference(uri=uri)) is None
        both.read(Reference(uri=uri))
    assert both.policy_error(Reference(uri="../manifest-private/c.png")) is not None


def test_a_manifest_folder_that_is_itself_a_link(base: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(base)
    for uri in ("refs/a.png", str(base / "refs/a.png"), str(tmp_path / "alias/refs/a.png")):
        reader(tmp_path / "alias").read(Reference(uri=uri))


def test_links_within_a_root_are_followed(base: Path) -> None:
    (base / "folder").symlink_to(base / "refs")
    (base / "refs" / "relative.png").symlink_to("a.png")
    for uri in ("folder/a.png", "folder/relative.png", "refs/relative.png"):
        reader(base).read(Reference(uri=uri))
    reader(base / "folder").read(Reference(uri="relative.png"))
    reader(base, base / "refs" / "a.png").read(Reference(uri=str(base / "refs" / "a.png")))


def _swap_file(base: Path, outside: Path) -> None:
    """Put a link that leads out in the place of a file, and the file back."""
    (base / "new").symlink_to(outside / "b.png")
    os.rename(base / "new", base / "refs" / "a.png")
    (base / "new").write_bytes(png())
    os.rename(base / "new", base / "refs" / "a.png")


def _swap_folder(base: Path, outside: Path) -> None:
    """Put a link that leads out in the place of a folder, and the folder back."""
    (base / "new").symlink_to(outside)
    os.rename(base / "refs", base / "old")
    os.rename(base / "new", base / "refs")
    os.rename(base / "refs", base / "new")
    os.rename(base / "old", base / "refs")
    (base / "new").unlink()


@pytest.mark.parametrize(("swap", "uri"), [(_swap_file, "refs/a.png"), (_swap_folder, "refs/b.png")])
def test_a_link_that_is_changed_meanwhile_leads_nowhere(
    base: Path, tmp_path: Path, swap: Callable[[Path, Path], None], uri: str
) -> None:
    """A reference is read in its root or not at all, even if a link appears between the look and the opening."""
    (base / "refs" / "b.png").write_bytes(png())
    over = threading.Event()

    def keep_swapping() -> None:
        while not over.is_set():
            swap(base, tmp_path / "outside")

    swapping = threading.Thread(target=keep_swapping)
    swapping.start()
    tried, read = time.monotonic() + 2, 0
    try:
        while time.monotonic() < tried:
            with contextlib.suppress(RowError):
                assert pixel(reader(base).read(Reference(uri=uri))) == (200, 10, 10)
                read += 1
    finally:
        over.set()
        swapping.join()
    assert read


def test_devices_are_not_read() -> None:
    with pytest.raises(RowError, match="folder, pipe or device"):
        reader("/dev").read(Reference(uri="zero"))


def test_a_refusal_is_the_nodes_trouble_not_the_rows(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trouble of storage, network or a node fails the attempt, never the row: credentials expire on single nodes."""

    def refuse(*_: object) -> bytes:
        raise PermissionError(13, "refused")

    monkeypatch.setattr(references.storage, "read_bytes", refuse)
    with pytest.raises(StorageError, match="check its permissions and the credentials"):
        reader(base).read(Reference(uri="refs/a.png"))


def test_size_limit(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references.FileReader, "max_bytes", len(png()))
    reader(base).read(Reference(uri="refs/a.png"))
    monkeypatch.setattr(references.FileReader, "max_bytes", len(png()) - 1)
    with pytest.raises(RowError, match="larger than the limit"):
        reader(base).read(Reference(uri="refs/a.png"))


def test_an_absent_root_is_the_nodes_trouble_not_the_rows(base: Path, tmp_path: Path) -> None:
    """Trouble of storage, network or a node fails the attempt, never the row."""
    with pytest.raises(StorageError, match="not there on this machine"):
        reader(base, tmp_path / "not-mounted").read(Reference(uri=str(tmp_path / "not-mounted" / "x.png")))


def test_embedded_bytes_are_used_as_they_are(base: Path) -> None:
    embedded = Reference(uri="http://nowhere.invalid/x.png", data=png((0, 255, 0)))
    assert reader(base).policy_error(embedded) is None
    assert pixel(reader(base).read(embedded)) == (0, 255, 0)
    with pytest.raises(RowError, match=r"\(embedded bytes\): .*empty"):
        reader(base).read(Reference(data=b""))


def test_readers_travel_to_workers(base: Path) -> None:
    pickle.loads(pickle.dumps(reader(base))).read(Reference(uri="refs/a.png"))


@pytest.mark.parametrize("root", ["", "s3://", "https://", "https://user:pw@example.org/", "https://e.org/a/../b"])
def test_unusable_roots_are_refused(base: Path, root: str) -> None:
    with pytest.raises(UsageError, match="--reference-root") as caught:
        reader(base, root)
    assert "pw" not in str(caught.value)


# Object storage


@pytest.fixture
def memory() -> Iterator[None]:
    fs = fsspec.filesystem("memory")
    for name, colour in {"bucket/run/refs/a.png": (1, 2, 3), "bucket/other/b.png": (4, 5, 6)}.items():
        fs.pipe_file("/" + name, png(colour))
    yield
    fs.rm("/bucket", recursive=True)


@pytest.mark.usefixtures("memory")
def test_fsspec_urls() -> None:
    near = reader("memory://bucket/run")
    assert pixel(near.read(Reference(uri="refs/a.png"))) == (1, 2, 3)
    assert pixel(near.read(Reference(uri="memory://bucket/x/.././run/refs/a.png"))) == (1, 2, 3)
    for uri in ("../other/b.png", "memory://bucket/run/../other/b.png", "memory://bucket/run-2/x.png", "/etc/passwd"):
        assert near.policy_error(Reference(uri=uri)) is not None
    assert pixel(reader("memory://bucket/run", "memory://bucket/other/").read(Reference(uri="../other/b.png"))) == (
        4,
        5,
        6,
    )
    with pytest.raises(RowError, match="does not exist"):
        near.read(Reference(uri="refs/missing.png"))


def test_object_storage_policy() -> None:
    """In object storage the manifest's own bucket is allowed, and keys compare segment by segment."""
    bucket = reader("s3://bucket/run/part")
    for uri in ("a.png", "../../a.png", "s3://bucket/elsewhere/a.png", "S3://bucket//double//slash.png"):
        assert bucket.policy_error(Reference(uri=uri)) is None, uri
    for uri in (
        "../../../a.png",
        "s3://bucket-2/a.png",
        "s3://bucket",
        "s3://bucket/",
        "gs://bucket/a.png",
        "s3://bucket/a.zip::x",
        "s3://bucket/" + "k" * 1025,
    ):
        assert bucket.policy_error(Reference(uri=uri)) is not None, uri
    folder = reader("/data", "s3://bucket/refs/")
    assert folder.policy_error(Reference(uri="s3://bucket/refs/a.png")) is None
    for uri in ("s3://bucket/refs-private/a.png", "s3://bucket/refs/../a.png", "s3://bucket/a.png"):
        assert folder.policy_error(Reference(uri=uri)) is not None, uri


def test_storage_trouble_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trouble of storage, network or a node fails the attempt, never the row."""

    def broken(*_: object) -> bytes:
        raise StorageError("503")

    monkeypatch.setattr(references.storage, "read_bytes", broken)
    with pytest.raises(StorageError):
        reader("memory://bucket/run").read(Reference(uri="a.png"))


# Web addresses


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(web_reading, "WEB_PAUSE_SECONDS", 0.0)
    with web.running() as address:
        yield address


def test_web_references_only_under_a_named_root(base: Path, site: str) -> None:
    """http(s) only when named as a root; not even the manifest's own web folder counts without."""
    uri = f"{site}/refs/a.png"
    for refused in (reader(base), reader(f"{site}/refs")):
        with pytest.raises(RowError, match="--reference-root"):
            refused.read(Reference(uri=uri))
    assert not web.Site.hits
    assert pixel(reader(base, f"{site}/refs").read(Reference(uri=uri))) == web.PIXEL
    assert pixel(reader(f"{site}/refs", site).read(Reference(uri="a.png"))) == web.PIXEL
    assert pixel(reader(base, site).read(Reference(uri=f"{site}/refs/sp ace é.png"))) == web.PIXEL


@pytest.mark.parametrize(
    "uri",
    [
        "{site}/private/a.png",
        "{site}/refs/../private/a.png",
        "{site}/refs/%2e%2E/private/a.png",
        "{site}/refs/..%2Fprivate/a.png",
        "{site}/refs/..;/private/a.png",
        "{site}/refs/..\\private/a.png",
        "{site}@example.org/refs/a.png",
        "{user}/refs/a.png",
        "{https}/refs/a.png",
        "{site}1/refs/a.png",
        "http://[/refs/a.png",
    ],
)
def test_web_addresses_outside_the_root(base: Path, site: str, uri: str) -> None:
    user, https = site.replace("//", "//user:hunter2@"), site.replace("http:", "https:")
    with pytest.raises(RowError) as caught:
        reader(base, f"{site}/refs").read(Reference(uri=uri.format(site=site, user=user, https=https)))
    assert not web.Site.hits
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("target", ["outside", "host", "file"])
def test_redirects_do_not_leave_the_root(base: Path, site: str, target: str) -> None:
    with pytest.raises(RowError):
        reader(base, f"{site}/refs").read(Reference(uri=f"{site}/refs/to-{target}"))
    assert web.Site.hits == [f"/refs/to-{target}"]


def test_redirects_inside_the_root_are_followed(base: Path, site: str) -> None:
    assert pixel(reader(base, f"{site}/refs").read(Reference(uri=f"{site}/refs/to-inside"))) == web.PIXEL


def test_web_answers(base: Path, site: str) -> None:
    """Trouble of storage, network or a node fails the attempt, never the row; what the row got wrong fails the row."""
    from_web = reader(base, site)
    assert pixel(from_web.read(Reference(uri=f"{site}/refs/flaky.png"))) == web.PIXEL
    for status, error, message in (
        (404, RowError, "does not exist"),
        (410, RowError, "does not exist"),
        (403, RowError, "answers 403"),
        (503, StorageError, "after 3 tries"),
        (530, StorageError, "answers 530"),
        (429, StorageError, "answers 429"),
    ):
        with pytest.raises(error, match=message) as caught:
            from_web.read(Reference(uri=f"{site}/refs/status-{status}?X-Signature=hunter2"))
        assert "hunter2" not in str(caught.value)
        assert "secret body" not in str(caught.value)
    with pytest.raises(StorageError, match="IncompleteRead"):
        from_web.read(Reference(uri=f"{site}/refs/short.png"))


def test_an_unreachable_server_is_storage_trouble(base: Path, site: str) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), web.Site) as closed:
        port = closed.server_address[1]
    gone = f"http://127.0.0.1:{port}"
    with pytest.raises(StorageError, match="after 3 tries"):
        reader(base, gone).read(Reference(uri=f"{gone}/a.png"))


REDIRECTED = {
    "to-broken": "http://[::1/x",
    "to-port": "http://127.0.0.1:99999999/x",
    "to-letters": "http://\u043f\u0440.\u0440\u0444/x",
}


@pytest.mark.parametrize("name", REDIRECTED)
def test_a_redirect_to_no_address_fails_the_row(base: Path, site: str, name: str) -> None:
    """What a server answers is the row's trouble, and kills no worker."""
    with pytest.raises(RowError, match=f"refs/{name}"):
        reader(base, site).read(Reference(uri=f"{site}/refs/{name}"))


@pytest.mark.parametrize("name", ["gzip.png", "gzip-said-only.png"])
def test_a_file_that_is_sent_as_gzip_is_unpacked(base: Path, site: str, name: str) -> None:
    """Some servers pack what they are asked not to, or say so of files that are not packed."""
    data = web.picture()
    reference = Reference(uri=f"{site}/refs/{name}", sha256=hashlib.sha256(data).hexdigest())
    assert pixel(reader(base, site).read(reference)) == web.PIXEL


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gzip-bomb.png", "larger than the limit of 1000000 bytes"),
        ("gzip-cut.png", "a gzip stream that is cut off"),
        ("gzip-damaged.png", "a damaged gzip stream"),
        ("brotli.png", "with the Content-Encoding 'br'; let it send the file as it is"),
    ],
)
def test_what_cannot_be_unpacked_fails_the_row(
    base: Path, site: str, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(references.FileReader, "max_bytes", 1_000_000)
    with pytest.raises(RowError, match=message):
        reader(base, site).read(Reference(uri=f"{site}/refs/{name}"))


def test_an_address_is_sent_as_browsers_send_it(base: Path, site: str) -> None:
    """Paths and queries are encoded as UTF-8, each with the characters that browsers encode there, and none twice."""
    with pytest.raises(RowError, match="does not exist"):
        reader(base, site).read(Reference(uri=f"{site}/a b/\u00e9%20<{{'}}>[1]|?q=\u00e9 '<>{{}}&r=%2B+#part"))
    assert web.Site.hits == ["/a%20b/%C3%A9%20%3C%7B'%7D%3E[1]|?q=%C3%A9%20%27%3C%3E{}&r=%2B+"]


@pytest.mark.parametrize(
    ("host", "asked"),
    [
        ("\u043f\u0440\u0438\u043c\u0435\u0440.\u0440\u0444", "xn--e1afmkfd.xn--p1ai"),
        ("stra\u00dfe.de", "xn--strae-oqa.de"),
        ("\u30c6\u30b9\u30c8\u3002jp:8080", "xn--zckzah.jp"),
        ("my_host.M\u00dcNCHEN.de", "my_host.xn--mnchen-3ya.de"),
        ("%D0%BF%D1%80.de", "xn--o1ac.de"),
    ],
)
def test_hosts_of_other_letters_are_asked_for_as_browsers_do(
    base: Path, monkeypatch: pytest.MonkeyPatch, host: str, asked: str
) -> None:
    """A root may be spelled either way. Without a network, it is the network's trouble, which a later try may pass."""
    looked_up: list[str] = []

    def offline(name: object, *_: object, **__: object) -> None:
        looked_up.append(name.decode() if isinstance(name, bytes) else str(name))
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(web_reading, "WEB_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setenv("no_proxy", "*")
    for root in (f"http://{host}", f"http://{asked}{':8080' * (':8080' in host)}"):
        with pytest.raises(StorageError, match="after 3 tries: URLError"):
            reader(base, root).read(Reference(uri=f"http://{host}/a.png"))
    assert set(looked_up) == {asked}


@pytest.mark.parametrize(
    "host",
    [
        "a..b",
        "x" * 64 + ".de",
        "\u00fc" * 70,
        "\u200d\u00fc.de",
        "xn--\u00fc.de",
        "\u00fc.de%2Fa",
        "%ff.de",
        "\u00fc\uff0fa.de",
    ],
)
def test_a_host_that_is_none_fails_the_row(base: Path, host: str) -> None:
    """The row is named at once; the address is neither tried again nor on another worker."""
    uri = f"http://{host}/a.png"
    try:
        both = reader(base, f"http://{host}")
    except UsageError:
        both = reader(base, "http://other.invalid")
    with pytest.raises(RowError, match="usable"):
        both.read(Reference(uri=uri))


@pytest.mark.parametrize("error", [OverflowError("odd"), RecursionError("deep"), TypeError("driver"), KeyError("k")])
def test_whatever_reading_raises_is_the_rows(base: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Nothing that reading a reference can raise leaves the row: its message has the class of the error."""

    def broken(*_: object) -> bytes:
        raise error

    local, reference = reader(base), Reference(uri="refs/a.png")
    for place in ("read_bytes", "is_local"):
        with monkeypatch.context() as patch:
            patch.setattr(references.storage, place, broken)
            with pytest.raises(RowError, match=rf"refs/a.png' cannot be read: {type(error).__name__}: "):
                local.read(reference)
    with monkeypatch.context() as patch:
        patch.setattr(references.storage, "is_local", broken)
        assert type(error).__name__ in (local.policy_error(reference) or "")


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), SystemExit(1)])
def test_what_concerns_the_process_is_not_the_rows(
    base: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Memory that runs out, Ctrl-C and an exit of the process pass through."""

    def broken(*_: object) -> bytes:
        raise error

    monkeypatch.setattr(references.storage, "read_bytes", broken)
    with pytest.raises(type(error)):
        reader(base).read(Reference(uri="refs/a.png"))
    monkeypatch.setattr(references.images, "decode", broken)
    with pytest.raises(type(error)):
        reader(base).read(Reference(data=png()))


def test_trouble_of_the_system_is_not_the_rows(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trouble of storage, network or a node fails the attempt, never the row: a machine may run out of open files."""

    def exhausted(*_: object) -> str:
        raise OSError(24, "Too many open files")

    broken = reader(base)
    monkeypatch.setattr(references.os.path, "realpath", exhausted)
    with pytest.raises(StorageError, match="Too many open files"):
        broken.read(Reference(uri="refs/a.png"))


def test_a_server_that_drips_is_given_up(base: Path, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_reading, "WEB_TOTAL_SECONDS", -1.0)
    with pytest.raises(StorageError, match="not complete"):
        reader(base, site).read(Reference(uri=f"{site}/refs/a.png"))


def test_a_reference_of_other_bytes_is_refused(base: Path) -> None:
    """Where the manifest gives the hash of a reference, other bytes fail the row before they are decoded."""
    data = (base / "refs" / "a.png").read_bytes()
    right, wrong = hashlib.sha256(data).hexdigest(), "0" * 64
    for reference in (Reference("refs/a.png"), Reference(data=data)):
        reader(base).read(dataclasses.replace(reference, sha256=right))
        with pytest.raises(RowError, match=f"has the SHA-256 {right}, and the manifest says {wrong}: put the image"):
            reader(base).read(dataclasses.replace(reference, sha256=wrong))
    (base / "refs" / "a.png").write_bytes(b"no image")
    with pytest.raises(RowError, match=f"and the manifest says {right}"):
        reader(base).read(Reference("refs/a.png", sha256=right))
