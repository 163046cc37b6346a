"""Check the environment of a machine: package versions, devices, and folders with their free space."""

import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

OK, NOTE, BAD = "ok", "note", "bad"
_LOW_SPACE = 2e9  # bytes
# Versions that satisfy the requirements but are known to give wrong results or to load files unsafely.
KNOWN_BAD = {
    "torch": ("<2.10", "its restricted unpickler has known holes (CVE-2025-32434, CVE-2026-24747)"),
    "setuptools": (">=81", "robustbench imports pkg_resources, which later versions lack"),
    "huggingface_hub": (">=2", "timm 1.0.9 does not work with it"),
}


class EnvironmentCheck(NamedTuple):
    """Result of one check: its subject, the state `ok`, `note` or `bad`, and what was found."""

    what: str
    state: str
    found: str


def check_environment(cache: Path, here: Path) -> list[EnvironmentCheck]:
    """Return all checks; `cache` is the folder of downloaded weights, `here` the folder of runs."""
    return [
        EnvironmentCheck("python", OK if sys.version_info >= (3, 11) else BAD, sys.version.split()[0]),
        *_packages(),
        *_devices(),
        *(_folder(name, path) for name, path in (("cache folder", cache), ("working folder", here))),
    ]


def check_package(name: str, found: str | None, wanted: Requirement, optional: str = "") -> EnvironmentCheck:
    """Return the check of one package; `found` is its version (None: not installed), `optional` the extra it is in."""
    if found is None and optional:
        return EnvironmentCheck(name, NOTE, f"not installed; rvaudit[{optional}]")
    if found is None:
        return EnvironmentCheck(name, BAD, "missing")
    bad, why = KNOWN_BAD.get(name.replace("-", "_"), ("", ""))
    if bad and Requirement(f"x{bad}").specifier.contains(found, prereleases=True):
        return EnvironmentCheck(name, BAD, f"{found}: {why}")
    if not wanted.specifier.contains(found, prereleases=True):
        return EnvironmentCheck(name, BAD, f"{found} is not {wanted.specifier}")
    return EnvironmentCheck(name, OK, found)


def _packages() -> list[EnvironmentCheck]:
    found = []
    for text in requires("rvaudit") or []:
        wanted = Requirement(text)
        extra = text.partition("extra == ")[2].strip("\"' ")
        if extra in ("test", "dev", "docs"):  # for developers only
            continue
        found.append(check_package(wanted.name, _version(wanted.name), wanted, extra))
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[EnvironmentCheck]:
    import torch

    count = torch.cuda.device_count()
    gpus = [EnvironmentCheck(f"cuda:{index}", OK, torch.cuda.get_device_name(index)) for index in range(count)]
    built = torch.version.cuda or "none"
    missing = EnvironmentCheck("cuda", NOTE, f"no GPU is visible (torch is built for CUDA {built}); runs use the CPU")
    return [*(gpus or [missing]), EnvironmentCheck("threads", OK, str(torch.get_num_threads()))]


def _folder(name: str, path: Path) -> EnvironmentCheck:
    """Check a folder by writing a file: permissions alone do not reveal full or read-only disks."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path) as file:
            file.write(b"rvaudit")
            file.flush()
    except OSError as error:
        return EnvironmentCheck(name, BAD, f"{path} cannot be written: {error.strerror or error}")
    free = shutil.disk_usage(path).free
    state = OK if free >= _LOW_SPACE else NOTE
    return EnvironmentCheck(name, state, f"{path}, {free / 1e9:.1f} GB free")
