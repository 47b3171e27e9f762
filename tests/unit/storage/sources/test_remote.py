"""Every kind of source on an S3-compatible store, with the store's options in the URI."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from edje_pipeline.storage.location import Location
from edje_pipeline.storage.plan import open_plan, read_unit, write_plan
from edje_pipeline.storage.schema import LISTING_SCHEMA
from edje_pipeline.storage.sources import SourceOptions, open_source, read_images

pytestmark = pytest.mark.filterwarnings("ignore")  # of moto's server


@pytest.fixture(scope="module")
def query() -> Iterator[str]:
    server_module = pytest.importorskip("moto.server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        options = f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
        store, _ = pafs.FileSystem.from_uri(f"s3://corpus{options}")
        store.create_dir("corpus")
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w") as archive:
            info = tarfile.TarInfo("k.jpg")
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
        parquet = io.BytesIO()
        pq.write_table(pa.table({"id": ["1"], "image": [b"zz"]}), parquet)
        for name, content in {
            "images/a b.jpg": b"a",
            "images/sub/c%d.png": b"c",
            "images/sub/e.txt": b"e",
            "tars/0.tar": tar.getvalue(),
            "tars/1.tar": tar.getvalue(),
            "list.txt": b"images/a b.jpg\ns3://corpus/images/sub/c%25d.png\n",
            "parquet/x.parquet": parquet.getvalue(),
        }.items():
            with store.open_output_stream(f"corpus/{name}") as stream:
                stream.write(content)
        yield options
        server.stop()


@pytest.mark.parametrize(
    ("place", "qualify_ids", "expected"),
    [
        ("images", False, {"a b.jpg": b"a", "sub/c%d.png": b"c"}),
        ("tars/0.tar", False, {"k": b"abc"}),
        ("tars", True, {"0/k": b"abc", "1/k": b"abc"}),
        ("tars/{0..1}.tar", True, {"0/k": b"abc", "1/k": b"abc"}),
        ("parquet", False, {"1": b"zz"}),
        ("list.txt", False, {"images/a b.jpg": b"a", "s3://corpus/images/sub/c%25d.png": b"c"}),
    ],
)
def test_each_kind_is_listed_and_read(query: str, place: str, qualify_ids: bool, expected: dict[str, bytes]) -> None:
    source = open_source(f"s3://corpus/{place}{query}", options=SourceOptions(qualify_ids=qualify_ids))
    table = pa.Table.from_batches(source.list_batches(), LISTING_SCHEMA)
    blobs = read_images(source.to_dict(), table)
    assert dict(zip(table.column("image_id").to_pylist(), blobs, strict=True)) == expected
    assert source.describe().split(" at ")[-1].split(" in ")[-1].startswith(f"s3://corpus/{place}")
    assert "endpoint" not in source.describe()


def test_a_plan_on_the_store(query: str) -> None:
    place = Location.parse(f"s3://corpus/plan{query}")
    info = write_plan(open_source(f"s3://corpus/images{query}"), place)
    assert info.num_rows == read_unit(place, 0).num_rows == 2
    assert open_plan(place) == info
