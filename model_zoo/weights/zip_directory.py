"""Check that the central directory of a zip archive has exactly the layout that torch.save writes.

Zip readers locate the members in different ways: by an offset, or by a search from the end. A crafted file can
therefore show harmless members to a check and others to the reader that opens it. Only the unambiguous layout passes.
"""

import struct

from audit.errors import UnsafeError

_END = struct.Struct("<4s4H2LH")  # end-of-directory record: the last 22 bytes of an archive without a comment
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_MEMBER = b"PK\x01\x02"
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
MAX_MEMBERS = 100_000


def check_zip_directory(data: bytes, origin: str) -> bool:
    """Return whether the archive ends in its directory, as torch.save writes it; False for a truncated file.

    Raises UnsafeError for more than 100,000 members, and for a directory that two readers may interpret differently.
    """
    # counted before parsing, which allocates half a kilobyte of objects per member
    members = data.count(_MEMBER)
    if members > MAX_MEMBERS:
        raise UnsafeError(f"{origin} is a zip of {members} members, more than {MAX_MEMBERS}; it is not opened")
    end = len(data) - _END.size
    if end < 0 or data[end : end + 4] != b"PK\x05\x06":
        return False
    _, _, _, _, count, size, offset, comment = _END.unpack_from(data, end)
    if comment or (
        not _is_plain_directory(data, end, size, offset) and not _is_zip64_directory(data, end, (count, size, offset))
    ):
        raise UnsafeError(f"{origin} is a zip whose directory is not where torch.save puts it; it is not opened")
    return True


def _is_plain_directory(data: bytes, end: int, size: int, offset: int) -> bool:
    """Return whether a 32-bit directory lies directly before its end record, with no 64-bit record announced."""
    return offset + size == end and data[end - _LOCATOR.size : end - _LOCATOR.size + 4] != b"PK\x06\x07"


def _is_zip64_directory(data: bytes, end: int, plain: tuple[int, int, int]) -> bool:
    """Return whether the 64-bit end record lies directly before its locator and agrees with the 32-bit one."""
    locator = end - _LOCATOR.size
    record = locator - _END64.size
    if record < 0:
        return False
    mark, _, position, disks = _LOCATOR.unpack_from(data, locator)
    mark64, length, _, _, _, _, _, count, size, offset = _END64.unpack_from(data, record)
    agree = all(
        short in (full, most)
        for short, full, most in zip(plain, (count, size, offset), (_FULL16, _FULL32, _FULL32), strict=True)
    )
    whole = (mark, mark64, position, disks, length) == (b"PK\x06\x07", b"PK\x06\x06", record, 1, _END64.size - 12)
    return whole and agree and offset + size == record
