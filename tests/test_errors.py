"""Messages go to terminals, logs and published outputs, and hold values that come from anyone."""

import pickle

import pytest

from vcf_batch.errors import RowError, redact


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
        ("/plain/path@home", "/plain/path@home"),
        ("at 10:30 to me@home: a/b:c", "at 10:30 to me@home: a/b:c"),
    ],
)  # fmt: skip
def test_secrets_in_urls_are_removed(text: str, redacted: str) -> None:
    assert redact(text) == redacted
    assert str(RowError(text)) == redacted


def test_passwords_are_removed_where_a_driver_drops_the_scheme() -> None:
    error = RowError('Invalid bucket name "me:secret@bucket"; no such file: /me:secret@host/a.png')
    assert str(error) == 'Invalid bucket name "bucket"; no such file: /host/a.png'


def test_messages_cannot_drive_a_terminal() -> None:
    """What a file, a column or a row is called can neither move a cursor nor turn the text around."""
    error = RowError("one\r\x1b[2Jtwo\u202ethree\udcff\nfour: zwölf 猫")
    assert str(error) == "one\\r\\x1b[2Jtwo\\u202ethree\\udcff\nfour: zwölf 猫"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
