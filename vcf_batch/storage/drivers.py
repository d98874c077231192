"""fsspec drivers, and the options to create them with."""

from typing import Any

import fsspec.config
import fsspec.core

from vcf_batch.errors import UsageError

_CONNECT_SECONDS = 5
_READ_SECONDS = 20
_HTTP_SECONDS = 1800
_CONNECTIONS = 80
"""More than the commits that are under way side by side: the heartbeat of a lease must not wait for one of them."""
_NO_LISTINGS_CACHE = ("sftp", "ssh")
"""Drivers without a listings cache. They pass unknown options on to their connection, and it rejects them."""


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem (one per process and protocol) of a URL, and the path in it.

    Raises:
        UsageError: no driver is installed for the URL's protocol.
    """
    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url, **_options(protocol))
    except (ImportError, ValueError) as error:
        message = f"cannot use {url}: {error}. Install the fsspec driver of {protocol}:// or use another URL."
        raise UsageError(message) from error


def _options(protocol: str) -> dict[str, Any]:
    """Options to create the driver of ``protocol`` with."""
    options: dict[str, Any] = {} if protocol in _NO_LISTINGS_CACHE else {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        # botocore tries once: s3fs tries each request five times, and ``retried`` repeats the whole operation.
        options["config_kwargs"] = {
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": _CONNECTIONS,
        }
    elif protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=_HTTP_SECONDS, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        options["client_kwargs"] = {"timeout": timeout}
    # fsspec lets explicit options replace the user's configuration (FSSPEC_S3_... variables): merge instead.
    for option, value in fsspec.config.conf.get(protocol, {}).items():
        options[option] = {**options[option], **value} if isinstance(options.get(option), dict) else value
    return options
