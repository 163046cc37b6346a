"""What a machine has and lacks for an audit: versions, devices, folders, room."""

import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

OK, NOTE, BAD = "ok", "note", "bad"
_LEAST_FREE = 2e9
# Versions that satisfy the requirements, and yet are known to give wrong results or to load what they should not.
KNOWN_BAD = {
    "torch": ("<2.10", "its restricted unpickler has known holes (CVE-2025-32434, CVE-2026-24747)"),
    "timm": ("!=1.0.9", "robustbench 1.1.1 pins timm 1.0.9"),
    "setuptools": (">=81", "robustbench imports pkg_resources, which later ones lack"),
    "huggingface_hub": (">=2", "timm 1.0.9 cannot talk to it"),
}


class Finding(NamedTuple):
    """One thing looked at: its name, `ok`, `note` or `bad`, and what was found."""

    what: str
    state: str
    found: str


def examine(cache: Path, here: Path) -> list[Finding]:
    """Return everything looked at; `cache` is where fetched weights go, `here` where runs go."""
    return [
        Finding("python", OK if sys.version_info >= (3, 11) else BAD, sys.version.split()[0]),
        *_packages(),
        *_devices(),
        *(_folder(name, path) for name, path in (("cache folder", cache), ("working folder", here))),
    ]


def judge(name: str, found: str | None, wanted: Requirement, optional: str = "") -> Finding:
    """Return what is to be said of one package: `found` is its version, None where it is not installed.

    `optional` is the extra that it belongs to.
    """
    if found is None:
        return Finding(name, NOTE, f"not installed; rvaudit[{optional}]") if optional else Finding(name, BAD, "missing")
    bad, why = KNOWN_BAD.get(name.replace("-", "_"), ("", ""))
    if bad and Requirement(f"x{bad}").specifier.contains(found, prereleases=True):
        return Finding(name, BAD, f"{found}: {why}")
    if not wanted.specifier.contains(found, prereleases=True):
        return Finding(name, BAD, f"{found} is not {wanted.specifier}")
    return Finding(name, OK, found)


def _packages() -> list[Finding]:
    found = []
    for text in requires("rvaudit") or []:
        wanted = Requirement(text)
        extra = text.partition("extra == ")[2].strip("\"' ")
        if extra in ("test", "dev", "docs"):  # of developers
            continue
        found.append(judge(wanted.name, _version(wanted.name), wanted, extra))
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[Finding]:
    import torch

    count = torch.cuda.device_count()
    gpus = [Finding(f"cuda:{index}", OK, torch.cuda.get_device_name(index)) for index in range(count)]
    built = torch.version.cuda or "none"
    missing = Finding("cuda", NOTE, f"no GPU is seen (torch is built for CUDA {built}); runs take the CPU")
    return [*(gpus or [missing]), Finding("threads", OK, str(torch.get_num_threads()))]


def _folder(name: str, path: Path) -> Finding:
    """Try to write there: permissions alone do not tell about full or read-only disks."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path) as file:
            file.write(b"rvaudit")
            file.flush()
    except OSError as error:
        return Finding(name, BAD, f"{path} cannot be written: {error.strerror or error}")
    free = shutil.disk_usage(path).free
    state = OK if free >= _LEAST_FREE else NOTE
    return Finding(name, state, f"{path}, {free / 1e9:.1f} GB free")
