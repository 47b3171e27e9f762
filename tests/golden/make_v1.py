"""Makes tests/golden/v1: `python -m tests.golden.make_v1`. Run once a format version; the files are then frozen.

What they hold is in expected.json, written from the inputs and not read back from the index.
"""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pyarrow as pa

from edje_pipeline.storage.index import Index
from tests.index_factory import default_codec, run_extract, tokens_of

ROOT = Path(__file__).parent / "v1"
FIRST = [f"birds/{number:02d}.jpg" for number in range(12)] + ["ü/猫.png", "last"]
REJECTED = ["birds/03.jpg", "birds/09.jpg"]
SECOND = ["birds/05.jpg", "birds/09.jpg", "later.webp"]
REMOVED = ["birds/00.jpg"]


def expected() -> dict[str, object]:
    versions = {text: 0 for text in FIRST if text not in REJECTED and text not in REMOVED}
    versions.update(dict.fromkeys(SECOND, 1))
    images = {
        text: {
            "tokens_float16_base64": base64.b64encode(tokens_of(text, version).tobytes()).decode(),
            "embedding_float16_base64": base64.b64encode(tokens_of(text, version)[0, :6].tobytes()).decode(),
            "width": 100 + len(text),
            "height": 50,
        }
        for text, version in sorted(versions.items())
    }
    return {
        "format_version": 1,
        "tokens": {"num_tokens": 4, "dim": 8, "payload_bytes": 64, "codec": "float16"},
        "embedding_dim": 6,
        "counts": {"listed": 14, "accepted": 13, "rejected": 1, "tombstones": 2, "shards": 3},
        "rejects": {"birds/03.jpg": "corrupt"},
        "images": images,
        "snapshots": 2,
    }


def main() -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    index = ROOT / "index"
    run_extract(index, FIRST, rejected=REJECTED, chunk=8, row_group_rows=4, codec=default_codec())
    removed = pa.table({"image_id": REMOVED, "reason": ["missing"]})
    run_extract(index, SECOND, mode="add", version=1, removed=removed, row_group_rows=4)
    (index / ".lock").unlink()
    (index / "staging").rmdir()
    (ROOT / "expected.json").write_text(json.dumps(expected(), indent=1, ensure_ascii=False) + "\n")
    print(Index.open(index))


if __name__ == "__main__":
    main()
