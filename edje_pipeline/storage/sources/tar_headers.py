"""Where the members of a tar lie, read from its headers alone.

The bytes of a member are found by (offset, length) and never extracted, so no name inside a tar can
reach the file system. Understood: ustar, GNU long names (`L`), pax `path` and `size` (local and
global headers), base-256 sizes. Links, devices and directories carry no bytes and are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

BLOCK = 512
MAX_EXTENDED_HEADER = 1 << 20
"""Longest pax or long-name header that is believed; a real one has a few hundred bytes."""
MAX_MEMBER_BYTES = 1 << 50

_REGULAR = b"0\x007"
_HAS_NO_BODY = b"123456"


class TarError(ValueError):
    """The file is not a tar, or a header is damaged; `offset` says where."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


class TruncatedTarError(TarError):
    """The file ends inside a member or a header."""


@dataclass(frozen=True)
class Member:
    """One regular file of a tar."""

    name: str
    offset: int
    """Of the member's first byte in the tar."""
    length: int


class WindowReader:
    """Reads small pieces at growing offsets through one window, skipping what lies between by seeking."""

    def __init__(self, stream: IO[bytes] | Any, size: int, window_bytes: int) -> None:
        self._stream = stream
        self.size = size
        self._window_bytes = window_bytes
        self._start = 0
        self._window = b""

    def read_at(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer at the end of the file."""
        begin = offset - self._start
        if begin < 0 or begin + length > len(self._window):
            self._stream.seek(offset)
            self._window = self._stream.read(max(length, self._window_bytes))
            self._start, begin = offset, 0
        return self._window[begin : begin + length]


def scan_members(reader: WindowReader) -> Iterator[Member]:
    """Yields the regular members in order.

    Raises:
        TruncatedTarError: after every whole member was yielded, when the file ends too early.
        TarError: a header whose checksum or size is wrong; members before it were yielded.
    """
    position = 0
    override: dict[str, str] = {}
    common: dict[str, str] = {}
    while True:
        header = reader.read_at(position, BLOCK)
        if len(header) == 0 and position > 0:
            return  # no end-of-archive blocks: common in tars written as streams
        if len(header) < BLOCK:
            raise TruncatedTarError("the file ends inside a header", position)
        if header == bytes(BLOCK):
            return
        _check_sum(header, position)
        kind = header[156:157]
        length = _number(header[124:136], position)
        body = position + BLOCK
        if kind in (b"x", b"g", b"L", b"K"):
            content = _extended(reader, body, length)
            if kind == b"L":
                override["path"] = content.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
            elif kind == b"x":
                override.update(_pax(content, body))
            elif kind == b"g":
                common.update(_pax(content, body))
            position = body + _padded(length)
            continue
        fields = {**common, **override}
        override = {}
        if kind in _HAS_NO_BODY:
            position = body
            continue
        if "size" in fields:
            length = _decimal(fields["size"], position)
        if body + length > reader.size:
            raise TruncatedTarError("the file ends inside a member", position)
        if kind in _REGULAR and "GNU.sparse.major" not in fields:
            yield Member(fields.get("path") or _name(header), body, length)
        position = body + _padded(length)


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _check_sum(header: bytes, position: int) -> None:
    try:
        expected = _number(header[148:156], position)
    except TarError:
        expected = -1
    if expected != sum(header) - sum(header[148:156]) + 8 * 32:
        raise TarError("the header's checksum is wrong: not a tar, or damaged", position)


def _number(raw: bytes, position: int) -> int:
    """Octal text, or base-256 when the first bit is set."""
    if raw[0] & 0x80:
        value = int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    else:
        text = raw.split(b"\0", 1)[0].strip() or b"0"
        try:
            value = int(text, 8)
        except ValueError as error:
            raise TarError(f"a header field holds {text[:12]!r}, expected an octal number", position) from error
    if not 0 <= value <= MAX_MEMBER_BYTES:
        raise TarError(f"a member claims {value:,} bytes", position)
    return value


def _decimal(text: str, position: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 16):
        raise TarError(f"a pax header claims the size {text[:20]!r}", position)
    return int(text)


def _extended(reader: WindowReader, offset: int, length: int) -> bytes:
    if length > MAX_EXTENDED_HEADER:
        raise TarError(f"an extended header claims {length:,} bytes, more than {MAX_EXTENDED_HEADER:,}", offset)
    content = reader.read_at(offset, length)
    if len(content) < length:
        raise TruncatedTarError("the file ends inside an extended header", offset)
    return content


def _pax(content: bytes, position: int) -> dict[str, str]:
    """Records `<length> <key>=<value>\\n`."""
    fields: dict[str, str] = {}
    start = 0
    while start < len(content) and content[start] != 0:
        space = content.find(b" ", start, start + 20)
        digits = content[start:space] if space > start else b""
        end = start + int(digits) if digits.isdigit() else 0
        # A record ends after its own blank, or the scan would not move on.
        if not start < space < end <= len(content):
            raise TarError("a pax header is damaged", position)
        key, _, value = content[space + 1 : end - 1].partition(b"=")
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
        start = end
    return fields


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "backslashreplace")
