"""Every kind of source: what it lists, what it reads back, and how it says what is wrong."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from edje_pipeline.errors import ConfigError, SourceError, SourceNotFoundError
from edje_pipeline.storage.schema import LISTING_SCHEMA, RejectReason
from edje_pipeline.storage.sources import ReadFailure, SourceOptions, open_source, read_images, walk
from edje_pipeline.storage.sources import read as read_module


def listed(uri: str | Path, kind: str = "auto", **options: object) -> tuple[object, pa.Table]:
    source = open_source(str(uri), kind, options=SourceOptions(**options))
    return source, pa.Table.from_batches(source.list_batches(), LISTING_SCHEMA)


def contents(uri: str | Path, kind: str = "auto", **options: object) -> dict[str, bytes | ReadFailure]:
    """image_id -> bytes, through a listing, a JSON trip of the source, and the reader."""
    source, table = listed(uri, kind, **options)
    blobs = read_images(json.loads(json.dumps(source.to_dict())), table)
    return dict(zip(table.column("image_id").to_pylist(), blobs, strict=True))


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


class TestFolder:
    def test_ids_are_relative_paths_in_a_fixed_order(self, tmp_path: Path) -> None:
        touch(tmp_path, "b/x.JPG", "a.png", "b/c/d e.webp", "b/notes.txt", ".hidden.jpg", ".git/y.jpg", "é/ü.jpeg")
        found = contents(tmp_path)
        assert found == {name: name.encode() for name in ["a.png", "b/c/d e.webp", "b/x.JPG", "é/ü.jpeg"]}
        source, _ = listed(tmp_path)
        assert source.describe() == f"folder of 4 images at {tmp_path}"
        assert source.notes.to_lines() == ["1 files without an image suffix passed over (b/notes.txt)"]

    def test_suffixes_can_be_named_or_all(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.raw", "b.jpg", "plain")
        assert list(contents(tmp_path, suffixes=(".RAW",))) == ["a.raw"]
        assert list(contents(tmp_path, suffixes=("all",))) == ["a.raw", "b.jpg", "plain"]

    def test_links_are_followed_but_not_in_circles(self, tmp_path: Path) -> None:
        touch(tmp_path, "in/a.jpg", "in/sub/b.jpg")
        touch(tmp_path.parent, "outside-of-folder.jpg")
        (tmp_path / "in" / "sub" / "up").symlink_to(tmp_path / "in")
        (tmp_path / "in" / "link.jpg").symlink_to(tmp_path / "in" / "a.jpg")
        (tmp_path / "in" / "broken.jpg").symlink_to(tmp_path / "nowhere")
        found = contents(tmp_path / "in", "folder")
        assert set(found) == {"a.jpg", "sub/b.jpg", "link.jpg", "broken.jpg"}
        assert found["link.jpg"] == b"in/a.jpg"
        assert found["broken.jpg"] == ReadFailure(RejectReason.MISSING, "the listed file is not there any more")

    def test_a_name_that_is_not_utf8(self, tmp_path: Path) -> None:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))).write_bytes(b"x")
        assert contents(tmp_path) == {"caf\\xe9.jpg": b"x"}

    def test_names_with_every_odd_character(self, tmp_path: Path) -> None:
        names = ["a b.jpg", "a%20b.jpg", "a#b?c.jpg", "a\nb.jpg", "a:b.jpg", "a\\b.jpg", "{a,b}.jpg"]
        touch(tmp_path, *names)
        assert contents(tmp_path) == {name: name.encode() for name in sorted(names)}

    def test_a_large_directory_is_sorted_through_spilled_runs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = [f"{(7919 * n) % 1000:04d}-{'x' * (n % 50)}.jpg" for n in range(1000)]
        touch(tmp_path, *names)
        _, whole = listed(tmp_path)
        monkeypatch.setattr(walk, "SORT_RUN_NAMES", 7)
        _, spilled = listed(tmp_path)
        assert spilled.column("image_id").to_pylist() == whole.column("image_id").to_pylist() == sorted(names)

    def test_files_that_went_or_grew_are_failures_not_errors(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
        source, table = listed(tmp_path)
        (tmp_path / "a.jpg").unlink()
        (tmp_path / "b.jpg").unlink()
        (tmp_path / "b.jpg").mkdir()
        blobs = read_images(source.to_dict(), table, max_bytes=3)
        assert [blob.reason for blob in blobs] == ["missing", "missing", "too_many_bytes"]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_file_without_rights_is_unreadable(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.jpg")
        (tmp_path / "a.jpg").chmod(0)
        assert contents(tmp_path)["a.jpg"].reason is RejectReason.UNREADABLE


class TestWebDataset:
    MEMBERS = (("a.b.c.jpg", b"1"), ("a.b.c.txt", b"t"), ("./d/e.seg.PNG", b"2"), ("e.json", b"{}"), ("f.webp", b"33"))

    def test_keys_keep_dots_and_directories(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", self.MEMBERS)
        assert contents(path) == {"a.b.c": b"1", "d/e.seg": b"2", "f": b"33"}
        source, table = listed(path)
        assert source.kind == "webdataset"
        assert source.describe() == f"1 WebDataset tar with 3 images at {path}"
        assert table.column("uri")[0].as_py() == f"file://{path}#a.b.c.jpg"

    @pytest.mark.parametrize("pattern", ["{000..002}.tar", "00?.tar", "*.tar", "{000,001,002}.tar"])
    def test_many_tars_by_pattern_or_folder(self, tmp_path: Path, pattern: str) -> None:
        for number in range(3):
            write_tar(tmp_path / f"{number:03d}.tar", [(f"k{number}.jpg", b"%d" % number)])
        expected = {f"k{number}": b"%d" % number for number in range(3)}
        assert contents(tmp_path) == expected
        assert contents(f"{tmp_path}/{pattern}") == expected

    def test_ids_can_carry_the_name_of_the_tar(self, tmp_path: Path) -> None:
        for number in range(2):
            write_tar(tmp_path / f"{number}.tar", [("k.jpg", b"%d" % number)])
        assert contents(tmp_path, qualify_ids=True) == {"0/k": b"0", "1/k": b"1"}

    def test_a_truncated_tail_is_tolerated_and_counted(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", [("a.jpg", b"a" * 2000), ("b.jpg", b"b" * 2000)])
        path.write_bytes(path.read_bytes()[:4000])
        assert contents(path) == {"a": b"a" * 2000}
        source, _ = listed(path)
        assert source.notes.to_lines() == ["1 tars end too early; the whole members before the end are used (x.tar)"]

    def test_a_tar_that_shrinks_after_the_listing(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", [("a.jpg", b"a" * 2000), ("b.jpg", b"b" * 2000)])
        source, table = listed(path)
        path.write_bytes(path.read_bytes()[:4000])
        blobs = read_images(source.to_dict(), table)
        assert blobs[0] == b"a" * 2000
        assert blobs[1].reason is RejectReason.TRUNCATED

    def test_names_never_reach_the_file_system(self, tmp_path: Path) -> None:
        names = ["../../etc/passwd.jpg", "/etc/shadow.jpg", "a/../../b.jpg", "C:\\x.jpg"]
        path = write_tar(tmp_path / "x.tar", [(name, name.encode()) for name in names])
        before = sorted(os.walk(tmp_path))
        assert contents(path) == {name[:-4]: name.encode() for name in names}
        assert sorted(os.walk(tmp_path)) == before

    @pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.zst"])
    def test_compressed_tars_are_refused(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(gzip.compress(b"x"))
        for corpus in (tmp_path / name, tmp_path):
            with pytest.raises(SourceError, match="decompress it first"):
                listed(corpus)

    def test_what_is_not_a_tar_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "x.tar").write_bytes(b"hello" * 500)
        with pytest.raises(SourceError, match="checksum is wrong"):
            listed(tmp_path / "x.tar")
        (tmp_path / "x.tar").write_bytes(b"")
        with pytest.raises(SourceError, match="ends inside a header"):
            listed(tmp_path / "x.tar")

    def test_a_missing_tar_of_a_range(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "0.tar", [("a.jpg", b"a")])
        with pytest.raises(SourceNotFoundError, match=r"1\.tar does not exist"):
            listed(f"{tmp_path}/{{0..1}}.tar")


class TestParquet:
    def table(self, start: int = 0, num: int = 10) -> pa.Table:
        images = [b"image %d" % n for n in range(start, start + num)]
        return pa.table({"key": [f"k{n}" for n in range(start, start + num)], "jpg": images, "caption": ["c"] * num})

    def test_image_bytes_by_row_group(self, tmp_path: Path) -> None:
        pq.write_table(self.table(), tmp_path / "a.parquet", row_group_size=3)
        pq.write_table(self.table(10), tmp_path / "b.parquet", row_group_size=4)
        assert contents(tmp_path) == {f"k{n}": b"image %d" % n for n in range(20)}
        source, _ = listed(tmp_path)
        assert source.describe().startswith("2 Parquet files with 20 images")
        assert "id column 'key', image column 'jpg'" in source.describe()

    def test_rows_in_any_order_and_from_streamed_row_groups(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pq.write_table(self.table(0, 100), tmp_path / "a.parquet", row_group_size=50)
        monkeypatch.setattr(read_module, "WHOLE_GROUP_BYTES", 0)
        source, table = listed(tmp_path / "a.parquet")
        picked = table.take([99, 3, 50, 49, 0])
        assert read_images(source.to_dict(), picked) == [b"image %d" % n for n in (99, 3, 50, 49, 0)]

    def test_hugging_face_structs(self, tmp_path: Path) -> None:
        images = [{"bytes": b"x", "path": "a.jpg"}, None, {"bytes": None, "path": "b.jpg"}]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        pq.write_table(pa.table({"image": pa.array(images, kind), "id": [7, 8, 9]}), tmp_path / "a.parquet")
        found = contents(tmp_path / "a.parquet")
        assert found["7"] == b"x"
        assert found["8"] == found["9"] == ReadFailure(RejectReason.MISSING, "the row holds no image bytes")

    def test_img2dataset_rows_that_failed_are_passed_over_and_counted(self, tmp_path: Path) -> None:
        table = self.table(0, 3).append_column("status", pa.array(["success", "failed_to_download", "success"]))
        pq.write_table(table, tmp_path / "00000.parquet")
        assert list(contents(tmp_path)) == ["k0", "k2"]
        source, _ = listed(tmp_path)
        assert source.notes.to_lines() == ["1 rows that img2dataset could not download passed over (k1)"]

    def test_a_column_of_paths_makes_a_list(self, tmp_path: Path) -> None:
        touch(tmp_path, "x/1.jpg", "x/2.jpg")
        table = pa.table({"path": ["x/1.jpg", str(tmp_path / "x/2.jpg")], "name": ["one", "two"]})
        pq.write_table(table, tmp_path / "l.parquet")
        assert contents(tmp_path / "l.parquet", id_column="name") == {"one": b"x/1.jpg", "two": b"x/2.jpg"}

    def test_columns_that_are_not_there(self, tmp_path: Path) -> None:
        pq.write_table(self.table(), tmp_path / "a.parquet")
        with pytest.raises(SourceError, match="no id column named 'nope'; it has key, jpg, caption"):
            listed(tmp_path / "a.parquet", id_column="nope")
        with pytest.raises(SourceError, match="no image column named 'nope'"):
            listed(tmp_path / "a.parquet", image_column="nope")
        pq.write_table(pa.table({"a": [1]}), tmp_path / "b.parquet")
        with pytest.raises(SourceError, match="no image column among"):
            listed(tmp_path / "b.parquet")

    def test_damage_is_an_error_of_the_listing_and_a_failure_of_reading(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        path.write_bytes(b"PAR1 nothing")
        with pytest.raises(SourceError, match="not a readable Parquet file"):
            listed(path)
        pq.write_table(self.table(0, 100), path, compression="none", use_dictionary=False)
        source, table = listed(path)
        path.write_bytes(b"PAR1 nothing")
        assert {blob.reason for blob in read_images(source.to_dict(), table)} == {RejectReason.UNREADABLE}

    def test_a_row_group_that_unpacks_without_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        table = pa.table({"id": ["a", "b"], "image": [bytes(50 << 20), b"x"]})
        pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
        assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
        source, listing = listed(tmp_path / "a.parquet")
        blobs = read_images(source.to_dict(), listing, max_bytes=1 << 20)
        assert blobs[0].reason is RejectReason.TOO_MANY_BYTES
        assert blobs[1] == b"x"
        monkeypatch.setattr(read_module, "MAX_GROUP_BYTES", 1 << 20)
        assert {blob.reason for blob in read_images(source.to_dict(), listing)} == {RejectReason.TOO_MANY_BYTES}

    def test_img2dataset_metadata_beside_tars_and_files_is_left(self, tmp_path: Path) -> None:
        metadata = pa.table({"key": ["k"], "url": ["http://x/y.jpg"], "status": ["success"]})
        write_tar(tmp_path / "00000.tar", [("k.jpg", b"1"), ("k.json", b"{}"), ("k.txt", b"t")])
        pq.write_table(metadata, tmp_path / "00000.parquet")
        assert contents(tmp_path) == {"k": b"1"}
        (tmp_path / "00000.tar").unlink()
        touch(tmp_path, "00000/k.jpg", "00000/k.txt", "00000/k.json")
        assert list(contents(tmp_path)) == ["00000/k.jpg"]


class TestList:
    @pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
    @pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".jsonl"])
    def test_every_text_form(self, tmp_path: Path, suffix: str, packed: str) -> None:
        touch(tmp_path, "in/a b.jpg", "c.jpg")
        uris = ["in/a b.jpg", (tmp_path / "c.jpg").as_uri()]
        text = {
            ".txt": "\n".join([uris[0], "", uris[1]]),
            ".csv": 'caption,path\nx,{}\n"y, z",{}\n'.format(*uris),
            ".tsv": "uri\tn\n{}\t1\n{}\t2\n".format(*uris),
            ".jsonl": "".join(json.dumps({"image": uri}) + "\n" for uri in uris),
        }[suffix].encode()
        data = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packed](text)
        path = tmp_path / f"list{suffix}{packed}"
        path.write_bytes(data)
        assert contents(path) == {uris[0]: b"in/a b.jpg", uris[1]: b"c.jpg"}
        source, _ = listed(path)
        assert source.describe() == f"list of 2 images in {path}"

    def test_a_named_id_column(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.jpg")
        (tmp_path / "l.csv").write_text("sku,where\n17,a.jpg\n")
        assert contents(tmp_path / "l.csv", id_column="sku", image_column="where") == {"17": b"a.jpg"}

    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [
            ("l.csv", "a,b\n1,2\n", "no image column among"),
            ("l.csv", "path,x\na.jpg\n", "line 2 has 1 fields, the header 2"),
            ("l.csv", "path,id\n,1\n", "empty URI"),
            ("l.jsonl", '{"path": "a"}\n{\n', "line 2 is not JSON"),
            ("l.jsonl", '{"path": ["a"]}\n', "expected text"),
            ("l.jsonl", "3\n", "not a JSON object"),
            ("l.txt", "https://example.org/a.jpg\n", "download the images first"),
            ("l.txt", "gopher://x/y\n", "cannot read gopher"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path: Path, name: str, text: str, said: str) -> None:
        (tmp_path / name).write_text(text)
        with pytest.raises(SourceError, match=said):
            listed(tmp_path / name)

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "l.txt").write_bytes(b"ok.jpg\n\xff\xfe\n")
        with pytest.raises(SourceError, match="line 2 is not UTF-8"):
            listed(tmp_path / "l.txt")

    def test_a_bomb_in_a_list(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("edje_pipeline.storage.compressed.BOMB_BYTES", 1 << 20)
        (tmp_path / "l.txt.gz").write_bytes(gzip.compress(b"\n" * (16 << 20)))
        with pytest.raises(SourceError, match="decompression bomb"):
            listed(tmp_path / "l.txt.gz")

    def test_one_file_listed_under_two_ids_is_read_for_both(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.jpg")
        (tmp_path / "l.csv").write_text("id,path\n1,a.jpg\n2,a.jpg\n")
        assert contents(tmp_path / "l.csv", id_column="id") == {"1": b"a.jpg", "2": b"a.jpg"}


class TestDetection:
    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(SourceNotFoundError, match="does not exist"):
            open_source(str(tmp_path / "none"))
        with pytest.raises(SourceNotFoundError, match="no file matches"):
            open_source(f"{tmp_path}/*.tar")

    def test_a_kind_that_is_not_clear_or_not_known(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.jpg", "x.bin")
        write_tar(tmp_path / "a.tar", [("k.jpg", b"1")])
        with pytest.raises(SourceError, match="both tars and loose images"):
            open_source(str(tmp_path))
        assert list(contents(tmp_path, "folder")) == ["a.jpg"]
        assert list(contents(tmp_path, "webdataset")) == ["k"]
        with pytest.raises(SourceError, match="cannot tell what"):
            open_source(str(tmp_path / "x.bin"))
        with pytest.raises(ConfigError, match="--source"):
            open_source(str(tmp_path), "zip")
        with pytest.raises(SourceError, match="expects a directory"):
            open_source(str(tmp_path / "a.tar"), "folder")
        with pytest.raises(SourceError, match="expects a file"):
            open_source(str(tmp_path), "list")

    def test_loose_images_beside_parquet_with_images(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.jpg")
        pq.write_table(TestParquet().table(), tmp_path / "p.parquet")
        with pytest.raises(SourceError, match="both loose images and Parquet"):
            open_source(str(tmp_path))

    def test_options_make_the_json_trip(self) -> None:
        options = SourceOptions("id", "jpg", ("jpg",), qualify_ids=True)
        assert SourceOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options
