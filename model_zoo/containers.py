"""What a file is, judged from its bytes before anything in it is interpreted."""

import json
import pickletools
import struct
import zipfile
from io import BytesIO

from audit.errors import CheckpointError, UnsafeError

EXPORT_ADVICE = (
    "save only the tensors where the file comes from: "
    "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
)
_SLACK = 1_000_000
_MAX_MEMBERS = 100_000
_LEGACY_PICKLES = 5  # magic number, protocol, system info, contents, storage keys; raw storages follow


def sniff(data: bytes, origin: str) -> str:
    """Return "safetensors", "zip" or "pickle"; `origin` names the file in messages.

    Raises CheckpointError (empty, truncated, html, not_a_checkpoint) for every other content.
    """
    if not data:
        raise CheckpointError("empty", f"{origin} is empty (0 bytes); fetch it again")
    check_not_html(data, origin)
    if data.startswith(b"version https://git-lfs"):
        message = f"{origin} is a Git LFS pointer, not the weights; run `git lfs pull` where it comes from"
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
    """Raise CheckpointError (html) where the bytes begin a web page; `link` is where a person can fetch the file."""
    head = data[:2048].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"<") and (b"<html" in head or b"<!doctype html" in head or b"<head" in head):
        remedy = f"fetch it by hand from {link}" if link else "download the file itself again"
        message = f"{origin}: a web page (HTML) was saved in place of weights; {remedy}"
        raise CheckpointError("html", message)


def truncated(origin: str, detail: str) -> CheckpointError:
    """Return the error for a file that ends too early."""
    return CheckpointError("truncated", f"{origin} is truncated ({detail}); delete it and fetch it again")


def check_safetensors(data: bytes, origin: str) -> None:
    """Raise CheckpointError where the header does not parse or does not describe exactly the bytes there are."""
    length = struct.unpack("<Q", data[:8])[0]
    if 8 + length > len(data):
        raise truncated(origin, f"its header needs {8 + length} bytes, there are {len(data)}")
    try:
        header = json.loads(data[8 : 8 + length])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(map(int, ends), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        message = f"{origin} is not a safetensors file: its header does not parse; fetch it again"
        raise CheckpointError("not_a_checkpoint", message) from error
    if expected > len(data):
        raise truncated(origin, f"its header announces {expected} bytes, there are {len(data)}")


def check_zip(data: bytes, origin: str) -> None:
    """Raise UnsafeError for a zip that holds code or unpacks to more than it is.

    Raises CheckpointError (truncated, not_a_checkpoint) for one that torch.save did not write.
    """
    try:
        members = zipfile.ZipFile(BytesIO(data)).infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise truncated(origin, "its zip directory is missing") from error
    names = [member.filename for member in members]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        message = f"{origin} is a TorchScript archive, which holds code and is not run; {EXPORT_ADVICE}"
        raise UnsafeError(message)
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        message = f"{origin} is a compressed zip, which torch.save never writes and which can unpack to any size; "
        raise UnsafeError(message + EXPORT_ADVICE)
    total = sum(member.file_size for member in members)
    if total > len(data) + _SLACK or len(members) > _MAX_MEMBERS:
        message = f"{origin} has {len(data)} bytes and claims {total} in {len(members)} members; it is not opened"
        raise UnsafeError(message)
    if not any(name.rpartition("/")[2] == "data.pkl" for name in names):
        message = f"{origin} is a zip without data.pkl, so torch.save did not write it; give a weights file"
        raise CheckpointError("not_a_checkpoint", message)


def pickled_globals(data: bytes) -> set[str]:
    """Return the names that the pickles at the start of `data` would import, read without running anything.

    Raises ValueError where a pickle ends too early.
    """
    stream, found = BytesIO(data), set[str]()
    for _ in range(_LEGACY_PICKLES):
        if data[stream.tell() : stream.tell() + 1] != b"\x80":
            break
        strings: list[str] = []
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "GLOBAL":
                found.add(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                found.add(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    return found
