"""Detect the format of a weights file from its bytes, and check its container before its contents are parsed."""

import json
import struct
import zipfile
from io import BytesIO

from audit.errors import CheckpointError, UnsafeError
from model_zoo.untrusted import printable
from model_zoo.weights.zip_directory import MAX_MEMBERS, check_zip_directory

EXPORT_ADVICE = (
    "save only the tensors where the file comes from: "
    "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
)
_SLACK = 1_000_000
_MAX_HEADER = 8_000_000  # about 80,000 tensors; parsed JSON takes up to 24 times the memory of its text


def detect_format(data: bytes, origin: str) -> str:
    """Return the format of a weights file: "safetensors", "zip" or "pickle"; `origin` names it in messages.

    Raises CheckpointError (empty, truncated, html, not_a_checkpoint) for any other content.
    """
    if not data:
        raise CheckpointError("empty", f"{origin} is empty (0 bytes); fetch it again")
    check_not_html(data, origin)
    if data.startswith(b"version https://git-lfs"):
        message = f"{origin} is a Git LFS pointer, not the weights; run `git lfs pull` in its repository"
        raise CheckpointError("not_a_checkpoint", message)
    if len(data) < 16:
        raise truncated(origin, f"it has only {len(data)} bytes")
    if data.startswith(b"PK\x03\x04"):
        return "zip"
    if data[0] == 0x80 and data[1] <= 5:
        return "pickle"
    if data[8:9] == b"{":
        return "safetensors"
    message = f"{origin} is neither safetensors nor a file written by torch.save; give a weights file"
    raise CheckpointError("not_a_checkpoint", message)


def check_not_html(data: bytes, origin: str, link: str = "") -> None:
    """Raise CheckpointError (html) where the bytes are a web page; `link` is the address for a manual download."""
    head = data[:2048].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"<") and (b"<html" in head or b"<!doctype html" in head or b"<head" in head):
        remedy = f"fetch it by hand from {link}" if link else "download the file itself again"
        message = f"{origin}: a web page (HTML) was saved in place of weights; {remedy}"
        raise CheckpointError("html", message)


def truncated(origin: str, detail: str) -> CheckpointError:
    """Return the CheckpointError of a truncated file."""
    return CheckpointError("truncated", f"{origin} is truncated ({detail}); delete it and fetch it again")


def check_safetensors(data: bytes, origin: str) -> None:
    """Check that a safetensors header parses and that its offsets lie within the file.

    Raises CheckpointError (truncated, not_a_checkpoint) where it does not, and UnsafeError for a header of more than
    8 MB.
    """
    length = struct.unpack("<Q", data[:8])[0]
    if 8 + length > len(data):
        raise truncated(origin, f"its header needs {8 + length} bytes, there are {len(data)}")
    if length > _MAX_HEADER:
        message = f"{origin} has a header of {length} bytes, more than {_MAX_HEADER}; it is not read"
        raise UnsafeError(message)
    try:
        header = json.loads(data[8 : 8 + length])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(map(int, ends), default=0)
    except Exception as error:  # untrusted JSON fails in many ways, deep nesting among them
        message = f"{origin} is not a safetensors file: its header does not parse; fetch it again"
        raise CheckpointError("not_a_checkpoint", message) from error
    if expected > len(data):
        raise truncated(origin, f"its header announces {expected} bytes, there are {len(data)}")


def read_zip_pickles(data: bytes, origin: str) -> list[bytes]:
    """Return the bytes of the pickles in a zip archive written by torch.save, without unpickling them.

    Raises UnsafeError for an archive that holds code, that unpacks to more than its size, or whose directory is
    ambiguous, and CheckpointError (truncated, not_a_checkpoint) for one that torch.save did not write.
    """
    whole = check_zip_directory(data, origin)
    try:
        archive = zipfile.ZipFile(BytesIO(data))
        members = archive.infolist()
    except Exception as error:  # zipfile raises a different type for every damaged field
        raise truncated(origin, "its zip directory is missing") from error
    _check_members(members, len(data), origin)
    if not whole:
        raise UnsafeError(f"{origin} is a zip with something after its directory, which torch.save never writes")
    try:
        return [archive.read(member) for member in members if member.filename.endswith(".pkl")]
    except Exception as error:
        raise truncated(origin, f"its member {printable(str(error))} cannot be read") from error


def _check_members(members: list[zipfile.ZipInfo], size: int, origin: str) -> None:
    names = [member.filename for member in members]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        message = f"{origin} is a TorchScript archive, which holds code and is not run; {EXPORT_ADVICE}"
        raise UnsafeError(message)
    if any(name.endswith((".py", "/extern_modules")) for name in names):
        raise UnsafeError(f"{origin} is a torch package, which holds code and is not run; {EXPORT_ADVICE}")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        message = f"{origin} is a compressed zip, which torch.save never writes and which can unpack to any size; "
        raise UnsafeError(message + EXPORT_ADVICE)
    total = sum(member.file_size for member in members)
    if total > size + _SLACK or len(members) > MAX_MEMBERS:
        message = f"{origin} has {size} bytes and claims {total} in {len(members)} members; it is not opened"
        raise UnsafeError(message)
    if not any(name.rpartition("/")[2] == "data.pkl" for name in names):
        message = f"{origin} is a zip without data.pkl, so torch.save did not write it; give a weights file"
        raise CheckpointError("not_a_checkpoint", message)
