"""What a cell's record says beside its measurements: a failure with its reason, a certificate, the machine."""

import platform
from dataclasses import replace
from importlib.metadata import version

import torch

from audit.certificate.layers import LayerCertificate
from audit.errors import AuditError
from audit.records import AuditRecord
from audit.run.cell import Cell
from audit.storage import digest


def failed_id(cell: Cell) -> str:
    """Return the id of a cell's failure: its weights or images may be what cannot be had, so names stand for them."""
    place = (cell.ref, cell.dataset, cell.images, cell.layer, cell.threat.norm, cell.threat.eps)
    return digest({"failed": [*place, repr(cell.settings)]})


def failure(cell: Cell, error: BaseException) -> AuditRecord:
    """Return the record of a cell that could not be measured, with the reason in a sentence."""
    first = next(iter(str(error).splitlines()), "")
    reason = first if isinstance(error, AuditError) else f"{type(error).__name__}: {first}".removesuffix(": ")
    return AuditRecord(
        cell_id=failed_id(cell),
        model=cell.name or cell.ref,
        source=cell.ref.partition(":")[0],
        family="unknown",
        training="unknown",
        trained_eps=0.0,
        dataset=cell.dataset,
        layer=cell.layer,
        norm=cell.threat.norm,
        eps=cell.threat.eps,
        weights_sha256="unknown",
        estimator=cell.settings.estimator.name,
        attack=cell.settings.attack.name_in(cell.threat.norm),
        seeds=len(cell.settings.seeds),
        images=cell.images or 0,
        status="failed",
        reason=reason,
        details={"error": type(error).__name__, "exit_code": getattr(error, "exit_code", 1)},
    )


def with_certificate(record: AuditRecord, found: LayerCertificate) -> AuditRecord:
    """Return a record with a certificate of its layer beside the estimates."""
    return replace(
        record,
        certified_bound=found.certified_bound,
        certified_bound_population=found.certified_bound_population,
        certified_tier=found.certified_tier if found.certified_bound is not None else "",
        best_head=found.best_head or "",
        best_head_accuracy=found.best_head_accuracy,
        flags=(*record.flags, *(flag.replace("weak attack", "weak_attack") for flag in found.flags)),
        passes=(record.passes or 0) + found.passes + found.attack_passes,
        details={**record.details, "certificate": found.to_dict()},
    )


def provenance(device: torch.device) -> dict[str, str]:
    """Return the versions and the hardware that a record was made with."""
    packages = ("rvaudit", "torch", "torchvision", "timm", "robustbench", "numpy")
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"python": platform.python_version(), "device": hardware, **{name: version(name) for name in packages}}
