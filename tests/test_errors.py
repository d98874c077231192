"""Messages go to terminals, logs and published outputs, and hold values that come from anyone."""

import pickle
import string
import time
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcf_batch.errors import RowError, redact, redact_name


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("https://user:secret@host/a.png", "https://host/a.png"),
        ("sftp://user@host/a", "sftp://host/a"),
        ("s3://user:se/cr@et@host/a", "s3://host/a"),
        ("s3://user:it's@host/a", "s3://host/a"),
        ("http://host:8080/a@2x.png", "http://host:8080/a@2x.png"),
        ("https://host/a.png?X-Amz-Signature=secret&b=1", "https://host/a.png?..."),
        ("https://host/my photo.png?sig=secret", "https://host/my photo.png?..."),
        ("failed: url='https://u:p@h/a?sig=secret', status=403", "failed: url='https://h/a?...', status=403"),
        ("Max retries exceeded: /a?sig=secret (timeout=5)", "Max retries exceeded: /a?... (timeout=5)"),
        ("s3://bucket/what?.png", "s3://bucket/what?.png"),
        ("s3://bucket/a#1;2.png", "s3://bucket/a#1;2.png"),
        ("s3://bucket/a.png#sig=secret", "s3://bucket/a.png#..."),
        ("https://host/a.png?secret", "https://host/a.png?..."),
        ("https://host/it's my photo.png?secret", "https://host/it's my photo.png?..."),
        ("https://host/a.png#secret", "https://host/a.png#..."),
        ("https://host/a;jsessionid=secret/b.png", "https://host/a;..."),
        ("Max retries exceeded: /a;jsessionid=secret", "Max retries exceeded: /a;jsessionid=..."),
        ("https://host/a.png%3Fsig%3Dsecret", "https://host/a.png%3F..."),
        ("https://host/a.png%253fsecret", "https://host/a.png%253f..."),
        ("a.png%3Fsig%3Dsecret", "a.png%3F..."),
        ("https://me%3Asecret%40host/a.png", "https://host/a.png"),
        ("zip://a.png::https://host/a.zip?secret", "zip://a.png::https://host/a.zip?..."),
        ("https://proxy/s3://host/a.zip?secret", "https://proxy/s3://host/a.zip?..."),
        ("s3://bucket/a https://host/a?secret", "s3://bucket/a https://host/a?..."),
        ("'https://h/a.png' is not in '/data/a#1'", "'https://h/a.png' is not in '/data/a#1'"),
        ("https://h/a.png: over 5; shrink it", "https://h/a.png: over 5; shrink it"),
        ("/data/a#1 100% ok?;.png", "/data/a#1 100% ok?;.png"),
        ("file:///data/a#1;b=c%23?.png", "file:///data/a#1;b=c%23?.png"),
        ("reference 'q?x=1.png' is not there", "reference 'q?x=1.png' is not there"),
        ("'/data/q?x=1.png' and 's3://bucket/q?x=2.png#n=3'", "'/data/q?x=1.png' and 's3://bucket/q?x=2.png#n=3'"),
        ("sftp://me:secret@host/q?x=1.png", "sftp://host/q?x=1.png"),
        ("Max retries exceeded: /a?x=1&X-Amz-Signature=secret", "Max retries exceeded: /a?..."),
        ("/plain/path@home", "/plain/path@home"),
        ("at 10:30 to me@home: a/b:c", "at 10:30 to me@home: a/b:c"),
    ],
)  # fmt: skip
def test_secrets_in_urls_are_removed(text: str, redacted: str) -> None:
    assert redact(text) == redacted
    assert str(RowError(text)) == redacted


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("q?x=1.png", "q?x=1.png"),
        ("q?token=1.png", "q?token=1.png"),
        ("a#b;c=1 d?e%3Ff=2.png", "a#b;c=1 d?e%3Ff=2.png"),
        ("/data/q?key=1.png", "/data/q?key=1.png"),
        ("file:///data/q?x=1.png", "file:///data/q?x=1.png"),
        ("s3://bucket/q?x=1.png#sig=2", "s3://bucket/q?x=1.png#sig=2"),
        ("s3://key:secret@bucket/q?x=1.png", "s3://bucket/q?x=1.png"),
        ("sftp://me:secret@host/q?x=1.png", "sftp://host/q?x=1.png"),
        ("http://host/q?x=1.png", "http://host/q?..."),
        ("HTTPS://me:secret@host/my photo.png?sig=a b", "HTTPS://host/my photo.png?..."),
        ("https://host/a;jsessionid=secret/b.png", "https://host/a;..."),
        ("zip://a?x=1.png::https://host/a.zip?secret", "zip://a?..."),
        ("simplecache::https://host/a.zip#secret", "simplecache::https://host/a.zip#..."),
        ("webhdfs://host/a?op=OPEN&delegation=secret", "webhdfs://host/a?..."),
        ("https://host/a.png?", "https://host/a.png?"),
        ("C:\\q?x=1.png", "C:\\q?x=1.png"),
        ("a.png?x=1&X-Amz-Signature=secret", "a.png?..."),
        ("s3://bucket/a.png%3FX-Goog-Credential%3Dsecret", "s3://bucket/a.png%3F..."),
    ],
)
def test_only_web_addresses_lose_their_queries(name: str, shown: str) -> None:
    """Names that are no web address stay as they are, and so stay different; passwords go from every URL."""
    assert redact_name(name) == shown


def test_a_relative_name_beside_a_manifest_on_the_web_is_a_web_address() -> None:
    """It loses its query there, and there alone."""
    assert redact_name("q?sig=secret", is_web=True) == "q?..."
    assert redact_name("s3://bucket/q?x=1.png", is_web=True) == "s3://bucket/q?x=1.png"


@given(st.lists(st.text(min_size=1), min_size=1, max_size=3))
def test_names_without_a_scheme_are_never_changed(parts: list[str]) -> None:
    """Whatever is in them."""
    name = "/".join(parts).replace("://", "_")
    assert redact_name(name) == name


SECRET = "S3cRetT0ken"
NAMES = st.text(string.ascii_letters + string.digits + "-_.~", min_size=1, max_size=8)
ENCODED = st.integers(0, 2)
"""How often a part of a URL is encoded."""


@st.composite
def urls_with_secrets(draw: st.DrawFn) -> str:
    """A URL of the web with the secret in one place, written out, or that part of it encoded once or twice."""
    path = "/".join(draw(st.lists(NAMES, min_size=1, max_size=3)))
    secret = draw(st.sampled_from([SECRET, f"{SECRET}.{SECRET}", f"a'{SECRET}", f"{SECRET}/b"]))
    named = draw(st.sampled_from(["", "sig=", "jsessionid=", "a=b&sig="]))
    more = draw(st.sampled_from(["", "?", "?x=1", "#", "#part", ";v=1", "/b.png"]))
    times = draw(ENCODED)

    def encoded(text: str) -> str:
        for _ in range(times):
            text = urllib.parse.quote_plus(text)
        return text

    if draw(st.booleans()):
        user = draw(st.sampled_from([f"me:{SECRET}@", f"{SECRET}@", f"{SECRET}:@", f"me:a/{SECRET}@"]))
        return f"https://{encoded(user) if '/' not in user else user}host/{path}{more}"
    mark = draw(st.sampled_from("?#;"))
    return f"https://host:8080/{path}{encoded(mark + named + secret)}{more}"


@given(
    urls_with_secrets(), st.sampled_from(["{}", "cannot read {!r}: 403", "{} and {}", "url='{}', again", "(see {})"])
)
def test_a_secret_is_shown_nowhere(url: str, sentence: str) -> None:
    """Wherever in a URL a secret stands, no message, record or page has it: they all show what is left of the URL."""
    text = sentence.format(url, url)
    assert SECRET not in redact(text)
    assert SECRET not in redact_name(url)
    assert redact(redact(text)) == redact(text)
    assert SECRET not in str(RowError(text))


@given(st.lists(st.text(string.ascii_letters + " #?%;&.", min_size=1), min_size=1, max_size=4))
def test_names_of_local_files_stay_readable(parts: list[str]) -> None:
    path = "/" + "/".join(parts)
    assert redact(f"cannot read {path!r}") == f"cannot read {path!r}"


@pytest.mark.parametrize(
    "text", ["http://" + "a" * 10**5, "http://a:" * 10**4, "http://" * 10**4, "?" * 10**5, "https://a" + " ?" * 10**5]
)
def test_a_long_reference_takes_no_time(text: str) -> None:
    """References may have 100,000 bytes, and each is redacted."""
    begin = time.process_time()
    redact(text)
    redact_name(text)
    assert time.process_time() - begin < 2


def test_passwords_are_removed_where_a_driver_drops_the_scheme() -> None:
    error = RowError('Invalid bucket name "me:secret@bucket"; no such file: /me:secret@host/a.png')
    assert str(error) == 'Invalid bucket name "bucket"; no such file: /host/a.png'


def test_messages_cannot_drive_a_terminal() -> None:
    """What a file, a column or a row is called can neither move a cursor nor turn the text around."""
    error = RowError("one\r\x1b[2Jtwo\u202ethree\udcff\nfour: zwölf 猫")
    assert str(error) == "one\\r\\x1b[2Jtwo\\u202ethree\\udcff\nfour: zwölf 猫"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
