"""Download a file to a temporary name, check it and rename it; a file that exists is only checked again.

A file without a published hash is trusted on first use: its hash is stored beside it (`.sha256`) and compared in every
later use.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import requests
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from audit.errors import CheckpointError, EnvironmentFault, IntegrityError, UnsafeError
from model_zoo.untrusted import MAX_FILE_BYTES, file_sha256, verify_sha256
from model_zoo.weights.formats import check_not_html, truncated

_CHUNK = 1 << 20
_TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two chunks
_HEADERS = {
    "User-Agent": "Mozilla/5.0 (compatible; rvaudit)",  # some hosts return an HTML page to the default agent
    "Accept-Encoding": "identity",  # a compressed body can unpack to any size
}


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file to download: its URL, its sha256 or a prefix of it, and a link for a manual download."""

    url: str
    sha256: str = ""
    link: str = ""


def fetch(download: Download, target: Path, *, offline: bool = False) -> Path:
    """Download a file to `target` unless it exists, verify its hash, and return `target`.

    Raises EnvironmentFault (offline, no network, disk full), CheckpointError (empty, truncated, html) and
    IntegrityError (not the published or the first-seen hash).
    """
    if target.exists():
        verify_sha256(target, download.sha256)
        return target
    if offline:
        message = (
            f"{target} does not exist and offline mode does not fetch it; put the file from {_link(download)} there"
        )
        raise EnvironmentFault(message)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.exists():  # another process may have downloaded it in the meantime
                _fetch_into(download, target)
    except requests.RequestException as error:
        reason = type(error).__name__
        message = f"cannot fetch {download.url} ({reason}); put the file from {_link(download)} at {target}"
        raise EnvironmentFault(message) from error
    except OSError as error:
        raise EnvironmentFault(f"cannot write {target}: {error.strerror or error}") from error
    verify_sha256(target, download.sha256)
    return target


def _fetch_into(download: Download, target: Path) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            length = _stream(download, target.name, file.fileno())
            os.fsync(file.fileno())
        _check_body(download, temporary, length)
        first_seen = target.with_name(f"{target.name}.sha256")
        first_seen.write_text(f"{file_sha256(temporary)}  {target.name}\n")
        temporary.chmod(0o644)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _stream(download: Download, name: str, descriptor: int) -> int | None:
    """Stream the body into an open file with a progress bar; return the Content-Length in bytes, None without one."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with (
        requests.get(download.url, stream=True, timeout=_TIMEOUT, headers=_HEADERS) as response,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        response.raise_for_status()
        length = _content_length(response, download.url)
        task, received = progress.add_task(f"fetching {name}", total=length), 0
        try:
            for chunk in response.iter_content(_CHUNK):
                received += len(chunk)
                _check_size(received, download.url)
                os.write(descriptor, chunk)
                progress.advance(task, len(chunk))
        except (requests.exceptions.ChunkedEncodingError, requests.ConnectionError):
            return length if length is not None else -1  # `_check_body` reports a truncated body
    return length


def _content_length(response: requests.Response, url: str) -> int | None:
    """Return the Content-Length of a response; raises UnsafeError for a compressed body and for one too large."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise UnsafeError(f"{url} was sent compressed ({encoding[:20]!r}) and can unpack to any size; it is not kept")
    stated = response.headers.get("Content-Length", "")
    length = int(stated) if stated.isdigit() else None
    _check_size(length or 0, url)
    return length


def _check_size(size: int, url: str) -> None:
    if size > MAX_FILE_BYTES:
        raise UnsafeError(f"{url} sends {size} bytes, more than the limit of {MAX_FILE_BYTES}; it is not kept")


def _check_body(download: Download, path: Path, length: int | None) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        check_not_html(file.read(2048), download.url, _link(download))
    if size == 0 and not length:
        raise CheckpointError("empty", f"{download.url} sent an empty body; try again or use {_link(download)}")
    if length is not None and size != length:
        raise truncated(download.url, f"{size} of {max(length, size)} bytes received")
    found = file_sha256(path)
    if download.sha256 and not found.startswith(download.sha256.lower()):
        message = f"{download.url} has sha256 {found}, not the published {download.sha256}; it is not kept"
        raise IntegrityError(message)


def _link(download: Download) -> str:
    return download.link or download.url
