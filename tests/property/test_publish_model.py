"""Any sequence of extracts, additions, deletions and rollbacks equals the same done to a dict."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.snapshots import delete, prune, rollback
from edje_pipeline.storage.verify import verify
from tests.index_factory import run_extract, tokens_of

IDS = [*"abcdefgh", "ä", "日本", "a/b", "aa", "Z", "~"]
some_ids = st.lists(st.sampled_from(IDS), unique=True, min_size=1, max_size=9)
step = st.one_of(
    st.tuples(st.just("new"), some_ids, st.sets(st.sampled_from(IDS), max_size=3)),
    st.tuples(st.just("add"), some_ids, st.sets(st.sampled_from(IDS), max_size=3)),
    st.tuples(st.just("missing"), some_ids, st.sets(st.sampled_from(IDS), max_size=3)),
    st.tuples(st.just("delete"), some_ids, st.just(set())),
    st.tuples(st.just("rollback"), st.just([]), st.just(set())),
    st.tuples(st.just("prune"), st.just([]), st.just(set())),
)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(step, min_size=1, max_size=5), st.integers(1, 6), st.integers(1, 5))
def test_equals_a_dict(steps: list[tuple[str, list[str], set[str]]], part_rows: int, chunk: int) -> None:
    root = Path(tempfile.mkdtemp(prefix="edje-model-"))
    try:
        live, rejects = {"a": 0, "b": 0, "c": 0}, {"d"}
        run_extract(root, ["a", "b", "c", "d"], rejected=["d"], part_rows=part_rows, chunk=chunk)
        history: list[tuple[dict[str, int], set[str]]] = []
        for version, (kind, ids, others) in enumerate(steps, start=1):
            before = (dict(live), set(rejects))
            if kind in ("new", "add"):
                run_extract(
                    root, ids, mode=kind, rejected=list(others), version=version, part_rows=part_rows, chunk=chunk
                )
                if kind == "new":
                    live, rejects = {}, set()
                for text in ids:
                    live.pop(text, None)
                    rejects.discard(text)
                    if text in others:
                        rejects.add(text)
                    else:
                        live[text] = version
                history.append(before)
            elif kind == "missing":
                removed = pa.table({"image_id": sorted(others), "reason": ["missing"] * len(others)})
                run_extract(root, ids, mode="add", version=version, removed=removed, part_rows=part_rows, chunk=chunk)
                for text in others:
                    live.pop(text, None)
                    rejects.discard(text)
                for text in ids:
                    live[text] = version
                    rejects.discard(text)
                history.append(before)
            elif kind == "delete":
                known = [text for text in ids if text in live or text in rejects]
                assert delete(Location.parse(root), ids).num_deleted == len(known)
                for text in known:
                    live.pop(text, None)
                    rejects.discard(text)
                if known:
                    history.append(before)
            elif kind == "rollback" and history:
                rollback(Location.parse(root))
                live, rejects = history.pop()
            elif kind == "prune":
                prune(Location.parse(root))
                history.clear()
            check(root, live, rejects)
    finally:
        shutil.rmtree(root)


def check(root: Path, live: dict[str, int], rejects: set[str]) -> None:
    index = Index.open(root)
    assert index.ids() == sorted(live)
    assert index.manifest.counts.rejected == len(rejects)
    if live:
        expected = np.stack([tokens_of(text, version) for text, version in live.items()]).astype(np.float32)
        np.testing.assert_array_equal(index.tokens(list(live)), expected)
    report = verify(Location.parse(root))
    assert report.problems == (), report.to_text()
