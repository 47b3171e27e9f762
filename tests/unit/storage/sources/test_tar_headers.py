"""The header scan against Python's tarfile, and against hostile tars."""

from __future__ import annotations

import contextlib
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje_pipeline.storage.sources.tar_headers import (
    MAX_EXTENDED_HEADER,
    TarError,
    TruncatedTarError,
    WindowReader,
    scan_members,
)

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar_of(members: list[tuple[str, bytes]], kind: str = "gnu", **fields: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[kind]) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def scan(data: bytes, window: int = 4096) -> list[tuple[str, bytes]]:
    reader = WindowReader(io.BytesIO(data), len(data), window)
    return [(m.name, data[m.offset : m.offset + m.length]) for m in scan_members(reader)]


@settings(max_examples=40, deadline=None)
@given(
    members=st.lists(
        st.tuples(st.text("ab/.é", min_size=1, max_size=140).map(lambda name: "k" + name), st.binary(max_size=1500)),
        max_size=5,
    ),
    kind=st.sampled_from(["gnu", "pax"]),
    window=st.sampled_from([512, 700, 1 << 16]),
)
def test_equal_to_tarfile(members: list[tuple[str, bytes]], kind: str, window: int) -> None:
    data = tar_of(members, kind)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(info.name, tar.extractfile(info).read()) for info in tar if info.isfile()]
    # tarfile takes a name with a slash at its end for a directory and drops the slash.
    found = [(name, content) for name, content in scan(data, window) if not name.endswith("/")]
    assert found == [(name, content) for name, content in expected if name in dict(found)]
    assert len(found) >= sum(not name.endswith("/") for name, _ in members)


def test_a_ustar_prefix_and_a_pax_global_header() -> None:
    name = "d" * 90 + "/" + "f" * 60 + ".jpg"
    assert scan(tar_of([(name, b"x")], "ustar")) == [(name, b"x")]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "hello"}) as tar:
        info = tarfile.TarInfo("é.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert scan(buffer.getvalue()) == [("é.jpg", b"abc")]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_links_devices_and_directories_are_passed_over(kind: bytes) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("link.jpg")
        info.type = kind
        info.linkname = "/etc/passwd"
        tar.addfile(info)
        info = tarfile.TarInfo("real.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"r"))
    assert scan(buffer.getvalue()) == [("real.jpg", b"r")]


def test_no_end_blocks_is_a_whole_tar() -> None:
    data = tar_of([("a.jpg", b"a" * 600), ("b.jpg", b"b")])[: 512 + 1024 + 512 + 512]
    assert [name for name, _ in scan(data)] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("cut", [512 + 10, 512 + 1024 + 100, 512 + 1024 + 512 + 1])
def test_a_cut_tar_gives_its_whole_members_and_then_says_so(cut: int) -> None:
    data = tar_of([("a.jpg", b"a" * 1000), ("b.jpg", b"b" * 1000)])[:cut]
    reader = WindowReader(io.BytesIO(data), len(data), 4096)
    found = []
    with pytest.raises(TruncatedTarError):
        found.extend(member.name for member in scan_members(reader))
    reader = WindowReader(io.BytesIO(data), len(data), 4096)
    members = scan_members(reader)
    if cut > 512 + 1024:
        assert next(members).name == "a.jpg"
    with pytest.raises(TruncatedTarError):
        next(members)


def with_size(data: bytes, field: bytes) -> bytes:
    header = bytearray(data[:512])
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


class TestHostileTars:
    def test_a_size_of_exabytes(self) -> None:
        data = tar_of([("a.jpg", b"abc")])
        with pytest.raises(TarError, match="claims"):
            scan(with_size(data, b"\x80" + b"\x7f" * 11))
        with pytest.raises(TruncatedTarError):
            scan(with_size(data, b"77777777777\0"))

    def test_a_negative_size(self) -> None:
        with pytest.raises(TarError):
            scan(with_size(tar_of([("a.jpg", b"abc")]), b"\xff" * 12))

    def test_a_size_that_is_no_number(self) -> None:
        with pytest.raises(TarError, match="octal"):
            scan(with_size(tar_of([("a.jpg", b"abc")]), b"banana\0\0\0\0\0\0"))

    def test_a_wrong_checksum(self) -> None:
        with pytest.raises(TarError, match="checksum"):
            scan(b"not a tar" * 200)

    def test_an_extended_header_without_end(self) -> None:
        data = tar_of([("x" * 200 + ".jpg", b"abc")])
        with pytest.raises(TarError, match="extended header claims"):
            scan(with_size(data, b"%011o\0" % (MAX_EXTENDED_HEADER + 1)))

    @pytest.mark.parametrize("record", [b"99999 path=a\n", b"-5 path=a\n", b"x path=a\n", b"path", b"0 a=b\n"])
    def test_a_damaged_pax_record(self, record: bytes) -> None:
        info = tarfile.TarInfo("h")
        info.type = b"x"
        info.size = len(record)
        data = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + tar_of([("a.jpg", b"x")])
        with pytest.raises(TarError, match="pax"):
            scan(data)

    @pytest.mark.parametrize("size", ["-1", "1e3", "9" * 30, "0x10", "٣"])
    def test_a_pax_size_that_is_no_size(self, size: str) -> None:
        data = tar_of([("a.jpg", b"abc")], "pax", pax_headers={"size": size})
        with pytest.raises(TarError, match="size"):
            scan(data)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=1600), at=st.integers(0, 1500))
def test_damage_never_raises_anything_else(data: bytes, at: int) -> None:
    good = bytearray(tar_of([("a" * 120 + ".jpg", b"abc"), ("b.jpg", b"d" * 600)], "pax"))
    good[at : at + len(data)] = data
    with contextlib.suppress(TarError):
        scan(bytes(good))
