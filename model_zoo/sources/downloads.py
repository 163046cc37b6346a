"""Fetch a file once: to a temporary name, checked, then renamed; what is there already is checked again.

A file whose hash nobody published is trusted on first use: its hash is kept beside it (`.sha256`) and compared
ever after.
"""

import os
import re
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from stat import S_ISREG

import requests
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from audit.errors import CheckpointError, EnvironmentFault, IntegrityError, UnsafeError
from model_zoo.weights.containers import check_not_html, truncated

MOST_BYTES = 32 << 30  # no weights of one model take more
_CHUNK = 1 << 20
_TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two pieces
_HEADERS = {
    "User-Agent": "Mozilla/5.0 (compatible; rvaudit)",  # some hosts answer the default agent with a page
    "Accept-Encoding": "identity",  # a packed body can unpack to any size
}


@dataclass(frozen=True, kw_only=True)
class Download:
    """One file on the network: its address, its sha256 or the beginning of it, and a link for people."""

    url: str
    sha256: str = ""
    link: str = ""


def fetch(download: Download, target: Path, *, offline: bool = False) -> Path:
    """Return `target`, fetched where it is not there yet and checked in either case.

    Raises EnvironmentFault (offline, no network, no room), CheckpointError (empty, truncated, html) and
    IntegrityError (another hash than the published or the first seen one).
    """
    if target.exists():
        verify(target, download.sha256)
        return target
    if offline:
        message = (
            f"{target} does not exist and offline mode does not fetch it; put the file from {_link(download)} there"
        )
        raise EnvironmentFault(message)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.exists():  # another process may have fetched it while this one waited
                _fetch_into(download, target)
    except requests.RequestException as error:
        reason = type(error).__name__
        message = f"cannot fetch {download.url} ({reason}); put the file from {_link(download)} at {target}"
        raise EnvironmentFault(message) from error
    except OSError as error:
        raise EnvironmentFault(f"cannot write {target}: {error.strerror or error}") from error
    verify(target, download.sha256)
    return target


def verify(path: Path, expected: str = "") -> str:
    """Return a file's sha256 after comparing it with the published one (or its beginning) and the first seen one.

    Raises IntegrityError where they differ.
    """
    found = file_sha256(path)
    memory = path.with_name(f"{path.name}.sha256")
    first_seen = _noted(memory) if memory.is_file() else ""
    for name, wanted in (("published", expected.lower()), ("first seen", first_seen)):
        if wanted and not found.startswith(wanted):
            message = f"{path} has sha256 {found}, not the {name} {wanted}; delete it and fetch it again"
            raise IntegrityError(message)
    return found


def _noted(memory: Path) -> str:
    with memory.open(errors="replace") as file:
        found = re.match(r"[0-9a-f]{64}\b", file.read(80))
    return found[0] if found else ""


def check_file(path: Path, most: int = MOST_BYTES) -> int:
    """Return the size of a file in bytes.

    Raises EnvironmentFault for what is no regular file (a folder, a pipe, a device), UnsafeError for one of more
    than `most` bytes, which may take no room on the disk and still fill the memory.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror or error}") from error
    if not S_ISREG(status.st_mode):
        raise EnvironmentFault(f"cannot read {path}: it is not a file but a folder, a pipe or a device")
    if status.st_size > most:
        raise UnsafeError(f"{path} has {status.st_size} bytes, more than the {most} it may have; it is not read")
    return status.st_size


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes in hex; raises EnvironmentFault where it cannot be read."""
    check_file(path)
    digest = sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def _fetch_into(download: Download, target: Path) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            announced = _stream(download, target.name, file.fileno())
            os.fsync(file.fileno())
        _check_body(download, temporary, announced)
        memory = target.with_name(f"{target.name}.sha256")
        memory.write_text(f"{file_sha256(temporary)}  {target.name}\n")
        temporary.chmod(0o644)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _stream(download: Download, name: str, descriptor: int) -> int | None:
    """Copy the body into an open file with a progress bar; return the announced length in bytes, if any."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with (
        requests.get(download.url, stream=True, timeout=_TIMEOUT, headers=_HEADERS) as response,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        response.raise_for_status()
        announced = _announced(response, download.url)
        task, arrived = progress.add_task(f"fetching {name}", total=announced), 0
        try:
            for chunk in response.iter_content(_CHUNK):
                arrived += len(chunk)
                _check_amount(arrived, download.url)
                os.write(descriptor, chunk)
                progress.advance(task, len(chunk))
        except (requests.exceptions.ChunkedEncodingError, requests.ConnectionError):
            return announced if announced is not None else -1  # a short body is judged like any other
    return announced


def _announced(response: requests.Response, url: str) -> int | None:
    """Return the length that a server states; raises UnsafeError for a packed body and for one too long."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise UnsafeError(f"{url} was sent packed ({encoding[:20]!r}), which can unpack to any size; it is not kept")
    length = response.headers.get("Content-Length", "")
    announced = int(length) if length.isdigit() else None
    _check_amount(announced or 0, url)
    return announced


def _check_amount(size: int, url: str) -> None:
    if size > MOST_BYTES:
        raise UnsafeError(f"{url} sends {size} bytes, more than the {MOST_BYTES} of any weights; it is not kept")


def _check_body(download: Download, path: Path, announced: int | None) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        check_not_html(file.read(2048), download.url, _link(download))
    if size == 0 and not announced:
        raise CheckpointError("empty", f"{download.url} answered with nothing; try again or use {_link(download)}")
    if announced is not None and size != announced:
        raise truncated(download.url, f"{size} of {max(announced, size)} bytes arrived")
    found = file_sha256(path)
    if download.sha256 and not found.startswith(download.sha256.lower()):
        message = f"{download.url} has sha256 {found}, not the published {download.sha256}; it is not kept"
        raise IntegrityError(message)


def _link(download: Download) -> str:
    return download.link or download.url
