"""The code blocks of docs/api.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.index_util import write_index
from tests.score_util import tiny_model

ROOT = Path(__file__).resolve().parents[2]


def blocks_of(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / name).read_text(), re.MULTILINE | re.DOTALL)


def test_api_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_index(tmp_path / "photos.edje", tiny_model(), ids=["a.jpg", "b.jpg", "c.jpg"])
    names: dict[str, object] = {}
    blocks = blocks_of("api.md")
    assert len(blocks) >= 6
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "3 ['a.jpg', 'b.jpg', 'c.jpg']" in printed
    assert "'z.jpg'" in printed
    assert "float32 (2,)" in printed
    assert "6 6 ['results/" in printed
