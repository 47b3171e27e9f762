"""What a run says of itself: shares, peaks, start-up, and lines that fit a terminal."""

from __future__ import annotations

import pyarrow as pa

from edje_pipeline.pipeline.metrics import RunMetrics, collect_metrics, with_metrics


def test_sums_survive_cutting_and_joining_and_the_rest_is_combined() -> None:
    first = with_metrics(
        pa.table({"row": [0, 1, 2]}), encode_s=3.0, encode_rss_bytes=10, encode_began_at=7.0, handed_on_bytes=300
    )
    second = with_metrics(
        pa.table({"row": [3]}), encode_s=1.0, encode_rss_bytes=30, encode_began_at=5.0, handed_on_bytes=100
    )
    whole = pa.concat_tables([first, second])
    parts = [collect_metrics(whole.slice(0, 2)), collect_metrics(whole.slice(2))]
    metrics = RunMetrics(num_workers={"encode": 1}, wall_s=8.0, began_at=3.5)
    metrics.add_all(parts)
    assert abs(metrics.values["encode_s"] - 4.0) < 1e-9
    assert abs(metrics.values["handed_on_bytes"] - 400) < 1e-9
    assert metrics.values["encode_rss_bytes"] == 30
    assert metrics.values["encode_began_at"] == 5.0
    assert metrics.startup_s == 1.5
    assert metrics.to_dict()["startup_s"] == 1.5
    assert "encode_began_at" not in metrics.to_dict()


def test_a_run_without_an_encoder_has_no_start_up() -> None:
    metrics = RunMetrics(wall_s=2.0, began_at=100.0)
    metrics.add({"write_s": 1.0})
    assert metrics.startup_s == 0.0


def test_summary_names_every_stage_and_fits_80_columns() -> None:
    metrics = RunMetrics(num_workers={"decode": 96, "encode": 8, "write": 8}, wall_s=123456.7, began_at=1.0)
    seconds = dict.fromkeys(("read_s", "decode_s", "encode_s", "encode_wait_s", "write_s"), 9_876_543.2)
    peaks = dict.fromkeys(("decode_rss_bytes", "encode_rss_bytes", "write_rss_bytes"), 123.4e9)
    metrics.add({**seconds, **peaks, "bytes_read": 9.9e15, "handed_on_bytes": 9.9e15, "encode_began_at": 31.0})
    lines = metrics.to_lines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for word in ("decode", "encode", "write", "encoder waiting", "read", "between the stages", "driver"):
        assert word in text
