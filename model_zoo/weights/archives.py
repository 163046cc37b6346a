"""The directory of a zip archive, held to the one layout that torch.save writes, so that every reader sees the same.

Readers find a zip's members in different ways: one believes an offset, another searches from the end. A file can
show harmless members to the check and others to the reader. Only archives on which all of them agree pass.
"""

import struct

from audit.errors import UnsafeError

_END = struct.Struct("<4s4H2LH")  # the end of the directory; its last 22 bytes where there is no comment
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_MEMBER = b"PK\x01\x02"
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
MAX_MEMBERS = 100_000


def check_directory(data: bytes, origin: str) -> bool:
    """Return whether the zip directory ends the bytes, as in a whole file of torch.save; False where it is cut off.

    Raises UnsafeError for more than 100,000 members and for a directory that two readers may read differently.
    """
    # counted before anything is parsed: half a kilobyte of objects stands for each member
    members = data.count(_MEMBER)
    if members > MAX_MEMBERS:
        raise UnsafeError(f"{origin} is a zip of {members} members, more than {MAX_MEMBERS}; it is not opened")
    end = len(data) - _END.size
    if end < 0 or data[end : end + 4] != b"PK\x05\x06":
        return False
    _, _, _, _, count, size, offset, comment = _END.unpack_from(data, end)
    if comment or (not _ends_at(data, end, size, offset) and not _ends_through(data, end, (count, size, offset))):
        raise UnsafeError(f"{origin} is a zip whose directory is not where torch.save puts it; it is not opened")
    return True


def _ends_at(data: bytes, end: int, size: int, offset: int) -> bool:
    """Whether a directory of the plain layout lies right before its end, with no second one announced."""
    return offset + size == end and data[end - _LOCATOR.size : end - _LOCATOR.size + 4] != b"PK\x06\x07"


def _ends_through(data: bytes, end: int, plain: tuple[int, int, int]) -> bool:
    """Whether the 64-bit record lies right before its locator, and says nothing else than the plain one."""
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
