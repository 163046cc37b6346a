"""Fetch single data files (never code) of Hugging Face hub repositories."""

import re
from pathlib import Path

from audit.errors import EnvironmentFault, IntegrityError
from model_zoo.downloads import file_sha256

_SHA256 = re.compile(r"[0-9a-f]{64}")


def hub_file(repo: str, filename: str, local: Path, *, offline: bool) -> tuple[Path, bool]:
    """Return a repository's file and whether its sha256 was compared with the one the hub states.

    A file at `local` is taken first. Raises EnvironmentFault where the file cannot be had, IntegrityError where
    it is not what the hub states.
    """
    if local.exists():
        return local, False
    # Imported here because it takes a good part of a second that other sources do not need.
    import huggingface_hub

    try:
        path = Path(huggingface_hub.hf_hub_download(repo, filename, local_files_only=offline))
    except (OSError, ValueError, RuntimeError, huggingface_hub.errors.HfHubHTTPError) as error:
        how = "offline mode does not fetch it" if offline else f"the hub does not give it ({type(error).__name__})"
        message = f"{filename} of {repo} is not on this machine and {how}; put the file at {local}"
        raise EnvironmentFault(message) from error
    return path, _stated_hash_holds(path)


def _stated_hash_holds(path: Path) -> bool:
    """Compare a cached file with its name: the hub's cache calls large files by their sha256."""
    stated = path.resolve().name
    if not _SHA256.fullmatch(stated):
        return False
    found = file_sha256(path)
    if found != stated:
        raise IntegrityError(f"{path} has sha256 {found}, the hub states {stated}; delete it and fetch it again")
    return True
