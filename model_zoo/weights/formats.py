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
_OTHER_FORMATS = {
    b"\x1f\x8b": "compressed with gzip; decompress it (gunzip) and give the weights file",
    b"BZh": "compressed with bzip2; decompress it (bunzip2) and give the weights file",
    b"\xfd7zXZ": "compressed with xz; decompress it (unxz) and give the weights file",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; decompress it (unzstd) and give the weights file",
    b"\x93NUMPY": f"a NumPy array; {EXPORT_ADVICE}",
    b"\x89HDF": f"an HDF5 file of Keras; copy its values into a torch network there, and {EXPORT_ADVICE}",
}
# The kinds of values that the reader of safetensors turns into tensors.
_KINDS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "F64", "C64"}
_KINDS |= {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
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
    # The length of a header may start like a pickle: 128 bytes are 80 00. No header reaches a petabyte.
    if data[8:9] == b"{" and data[6:8] == b"\0\0":
        return "safetensors"
    if data[0] == 0x80 and data[1] <= 5:
        return "pickle"
    if data[8:9] == b"{":
        return "safetensors"
    other = _other_format(data)
    what = f" but {other}" if other else "; give a weights file"
    raise CheckpointError("not_a_checkpoint", f"{origin} is neither safetensors nor a file written by torch.save{what}")


def _other_format(data: bytes) -> str:
    """Return what a file of another known format is and what to do with it, '' for an unknown one."""
    if data[257:262] == b"ustar":
        name = data[:100].partition(b"\0")[0].decode("ascii", "replace")
        if name.rpartition("/")[2] in ("sys_info", "pickle", "tensors", "storages"):
            old = "a tar file of torch before 0.1.10, which only torch's unrestricted reader opens"
            return f"{old}; where you trust it, open it with torch.load(path, weights_only=False), and {EXPORT_ADVICE}"
        return f"a tar archive (its first member is {printable(name)!r}); unpack it and give the weights file inside"
    return next((advice for magic, advice in _OTHER_FORMATS.items() if data.startswith(magic)), "")


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
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        ends = [entry["data_offsets"][1] for entry in entries]
        kinds = {str(entry["dtype"]) for entry in entries}
        expected = 8 + length + max(map(int, ends), default=0)
    except Exception as error:  # untrusted JSON fails in many ways, deep nesting among them
        message = f"{origin} is not a safetensors file: its header does not parse; fetch it again"
        raise CheckpointError("not_a_checkpoint", message) from error
    if unknown := sorted(kinds - _KINDS):
        message = f"{origin} holds tensors of the kind {printable(unknown[0], 20)}, which its reader does not know"
        raise CheckpointError("not_a_checkpoint", f"{message}; save them as F16, BF16 or F32")
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
