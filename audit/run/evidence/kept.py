"""The worst-case and adversarial images of a cell, kept as safetensors beside its record. Imports no torch."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from audit.errors import EnvironmentFault, IntegrityError
from audit.records import AuditRecord
from audit.storage import canonical_json, write_atomically

FOLDER = "images"
SCHEMA = "rvaudit.images/1"
_WORST = "worst.seed"


class KeptImages(NamedTuple):
    """The images of one cell: clean, adversarial and worst-case ones are float32 (N, C, H, W), labels int64 (N,).

    `adversarial` are those of the attack on the label, `worst` the worst-case images of each seed.
    """

    clean: Any
    labels: Any
    adversarial: Any
    worst: Mapping[int, Any]


class ImageKeeper:
    """Keeps the images of the cells of a run folder, if that is asked for."""

    def __init__(self, folder: Path | None, *, keep: bool) -> None:
        self._folder = Path(folder) if folder is not None and keep else None

    def satisfied(self, record: AuditRecord) -> bool:
        """Return whether a record has its images, or no images are asked for."""
        return self._folder is None or has_images(self._folder, record)

    def check(self) -> None:
        """Raise EnvironmentFault where images are asked for and the run folder is not on this machine."""
        if self._folder is not None and not self._folder.is_dir():
            raise EnvironmentFault(f"cannot keep images: the run folder {self._folder} is not on this machine")

    def beside(self, record: AuditRecord, collect: Callable[[], KeptImages]) -> AuditRecord:
        """Collect and store the images if they are asked for; return the record, with file and sha256 in its details.

        Raises EnvironmentFault if the file cannot be written.
        """
        if self._folder is None:
            return record
        kept = collect()
        about = {"schema": SCHEMA, "cell_id": record.cell_id, "norm": record.norm, "eps": record.eps}
        content = safetensors.numpy.save(_tensors(kept), _header(about))
        write_atomically(images_path(self._folder, record.cell_id), content)
        note = {"file": f"{FOLDER}/{record.cell_id}.safetensors", "sha256": sha256(content).hexdigest()}
        return replace(record, details={**record.details, "images": note})


def images_path(folder: Path, cell_id: str) -> Path:
    """Return the path of a cell's images in a run folder."""
    return Path(folder) / FOLDER / f"{cell_id}.safetensors"


def has_images(folder: Path, record: AuditRecord) -> bool:
    """Return whether a record names images and their file is in the run folder; `read_images` compares the hash."""
    return bool(record.details.get("images")) and images_path(folder, record.cell_id).is_file()


def finished(folder: Path, records: Iterable[AuditRecord], *, keep: bool) -> list[AuditRecord]:
    """Return the records that a run would not compute again: with `keep`, those without images are left out."""
    return [record for record in records if not (keep and record.valid) or has_images(folder, record)]


def read_images(folder: Path, record: AuditRecord) -> KeptImages:
    """Return the images of a record as NumPy arrays.

    Raises IntegrityError for a file that is missing, has another hash than the record states, or holds other tensors.
    """
    path, note = images_path(folder, record.cell_id), record.details.get("images")
    if not isinstance(note, dict):
        raise IntegrityError(f"the record {record.cell_id} names no images")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror or error}") from error
    found = sha256(content).hexdigest()
    if found != note.get("sha256"):
        raise IntegrityError(f"the sha256 of {path} is {found}, not {note.get('sha256')} as in the record")
    try:
        tensors = safetensors.numpy.load(content)
        seeds = record.details["identity"]["settings"]["seeds"]
        worst = {seed: tensors[f"{_WORST}{seed}"] for seed in seeds}
        kept = KeptImages(tensors["clean"], tensors["labels"], tensors["adversarial"], worst)
    except Exception as error:  # the reader raises exceptions of many kinds
        raise IntegrityError(f"{path} does not hold the images of the record: {error}") from error
    fault = _shape_fault(kept, record)
    if fault:
        raise IntegrityError(f"{path}: {fault}")
    return kept


def to_claim_file(kept: KeptImages, about: Mapping[str, Any]) -> bytes:
    """Return the file content of clean and adversarial images with their labels, described by JSON in the header."""
    arrays = {"clean": kept.clean, "adversarial": kept.adversarial, "labels": kept.labels}
    return safetensors.numpy.save(arrays, _header(about))


def _header(about: Mapping[str, Any]) -> dict[str, str]:
    """Return the header of a file: one entry, since several are written in random order, which changes the hash."""
    return {"rvaudit": canonical_json(dict(about))}


def _tensors(kept: KeptImages) -> dict[str, np.ndarray]:
    found = {"clean": kept.clean, "labels": kept.labels, "adversarial": kept.adversarial}
    found |= {f"{_WORST}{seed}": images for seed, images in kept.worst.items()}
    return {name: np.ascontiguousarray(tensor.detach().cpu().numpy()) for name, tensor in found.items()}


def _shape_fault(kept: KeptImages, record: AuditRecord) -> str:
    """Return what is wrong with types and shapes of the arrays; empty if nothing is."""
    if kept.labels.dtype != np.int64 or kept.labels.shape != (record.images,):
        return f"labels are {kept.labels.dtype} {kept.labels.shape}, not int64 ({record.images},)"
    named = {"clean": kept.clean, "adversarial": kept.adversarial}
    named |= {f"{_WORST}{seed}": images for seed, images in kept.worst.items()}
    for name, images in named.items():
        if images.dtype != np.float32 or images.ndim != 4 or images.shape != (record.images, *kept.clean.shape[1:]):
            return f"{name} is {images.dtype} {images.shape}, not float32 images of {record.images} rows"
    return ""
