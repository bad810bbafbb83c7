"""Members of an archive: a range of bytes, stored or compressed by deflate."""

from __future__ import annotations

import io
import os
import zlib
from typing import NamedTuple

# Bytes that are read, decompressed or skipped at once.
_BLOCK = 2**16


class Member(NamedTuple):
    """Where a member lies in its file."""

    start: int
    packed_bytes: int  # in the file
    num_bytes: int  # of its content
    is_packed: bool
    checksum: int | None  # CRC-32 of the content; None: not known


class MemberStream:
    """The content of a member, read once from its start to its end."""

    def __init__(self, file: io.FileIO, member: Member) -> None:
        file.seek(member.start)
        self._file = file
        self._member = member
        self._packed_left = member.packed_bytes
        self._left = member.num_bytes
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        self._checksum = 0

    def readinto(self, buffer: memoryview, /) -> int:
        """Read into a buffer, and return the number of bytes, 0 at the end."""
        buffer = buffer[: self._left]
        count = self._unpack(buffer) if self._member.is_packed else self._copy(buffer)
        self._left -= count
        if self._member.checksum is not None:
            self._checksum = zlib.crc32(buffer[:count], self._checksum)
        return count

    def read_past(self, num_bytes: int) -> None:
        """Read some bytes and drop them; the checksum includes them."""
        scratch = memoryview(bytearray(min(num_bytes, _BLOCK)))
        while num_bytes > 0:
            count = self.readinto(scratch[:num_bytes])
            if not count:
                raise ValueError("it ends within an array")
            num_bytes -= count

    def skip(self, num_bytes: int) -> None:
        """Go some bytes ahead, without reading them if they are not compressed."""
        if self._member.is_packed:
            self.read_past(num_bytes)
        else:
            self._file.seek(num_bytes, os.SEEK_CUR)
            self._left -= num_bytes

    def check_end(self) -> None:
        """Refuse a member that was read whole and is longer, or has other bytes."""
        if self._left:
            raise ValueError(f"{self._left} more bytes follow the array")
        if self._member.checksum not in (None, self._checksum):
            raise ValueError("its checksum is another one, so its bytes have changed")

    def _copy(self, buffer: memoryview) -> int:
        return self._file.readinto(buffer) or 0

    def _unpack(self, buffer: memoryview) -> int:
        while len(buffer):
            packed = self._inflate.unconsumed_tail
            if not packed:
                packed = self._file.read(min(_BLOCK, self._packed_left))
                self._packed_left -= len(packed)
            content = self._inflate.decompress(packed, min(_BLOCK, len(buffer)))
            if content or not packed:
                buffer[: len(content)] = content
                return len(content)
        return 0
