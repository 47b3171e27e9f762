"""User journeys of extract through the command line: good corpora, bad ones, and what comes after."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edje_pipeline.models.random_model import write_random_model
from edje_pipeline.storage.index import Index
from tests.extract_util import assert_sound, contents, run_cli, write_corpus, write_image

LOCAL = ("--executor", "local", "--num-cpus", 2, "--batch-size", 8, "--format", "json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_random_model(path, size="tiny")
    return path


@pytest.fixture(scope="module")
def extracted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus of 60 images and one bad file, and its index. Copy before changing either."""
    root = tmp_path_factory.mktemp("extracted")
    corpus = write_corpus(root / "corpus", 60, 1)
    ended = run_cli("extract", corpus, "--index", root / "index", "--model", model, *LOCAL)
    assert ended.returncode == 3, ended.stderr
    assert ended.result["num_listed"] == 61 == ended.result["num_accepted"] + 1
    return corpus, root / "index"


def copies(extracted: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The corpus at its place and a copy of the index: ids and uris stay."""
    shutil.copytree(extracted[1], tmp_path / "index")
    return extracted[0], tmp_path / "index"


@pytest.mark.ray
@pytest.mark.slow
def test_ray_and_local_executor_store_the_same_bytes(extracted: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    corpus, index = extracted
    ended = run_cli(
        "extract", corpus, "--index", tmp_path / "index", "--model", model, "--num-cpus", 2, "--batch-size", 8,
        timeout_s=180,
    )  # fmt: skip
    assert ended.returncode == 3, ended.stderr
    assert contents(tmp_path / "index") == contents(index)
    lines = [line for line in ended.stdout.splitlines() if not line.startswith("index ")]
    assert all(len(line) <= 80 for line in lines), ended.stdout
    assert "slowest stage" in ended.stdout
    assert "peak memory" in ended.stdout
    noise = [line for line in ended.stderr.splitlines() if not line.startswith(("extract:", "listing:", "folder of"))]
    assert noise == []


def test_incremental_computes_only_what_is_new_or_changed(model: Path, tmp_path: Path) -> None:
    corpus, index = write_corpus(tmp_path / "corpus", 30), tmp_path / "index"
    first = run_cli("extract", corpus, "--index", index, "--model", model, *LOCAL)
    assert first.returncode == 0, first.stderr
    before = contents(index)
    write_image(corpus / "new.jpg", 1000)
    write_image(corpus / "even" / "0004.jpg", 1001)
    (corpus / "odd" / "0005.jpg").unlink()
    second = run_cli("extract", corpus, "--index", index, *LOCAL)
    assert second.returncode == 0, second.stderr
    assert (second.result["num_computed"], second.result["num_unchanged"]) == (2, 28)
    after = contents(index)
    assert set(after) == {*before, "new.jpg"}
    assert {key for key in before if after[key] != before[key]} == {"even/0004.jpg"}
    third = run_cli("extract", corpus, "--index", index, "--prune-missing", *LOCAL)
    assert third.returncode == 0, third.stderr
    assert (third.result["num_computed"], third.result["num_removed"]) == (0, 1)
    assert set(contents(index)) == {*before, "new.jpg"} - {"odd/0005.jpg"}
    fourth = run_cli("extract", corpus, "--index", index, "--prune-missing", *LOCAL)
    assert fourth.returncode == 0
    assert fourth.result["snapshot"] is None
    assert Index.open(index).snapshot == third.result["snapshot"]


def test_retry_rejects_takes_in_what_works_now(model: Path, tmp_path: Path) -> None:
    corpus, index = write_corpus(tmp_path / "corpus", 12, 2), tmp_path / "index"
    assert run_cli("extract", corpus, "--index", index, "--model", model, *LOCAL).returncode == 3
    again = run_cli("retry-rejects", index, *LOCAL)
    assert again.returncode == 3
    assert again.result["snapshot"] is None
    write_image(corpus / "bad0.jpg", 77)
    mended = run_cli("retry-rejects", index, *LOCAL)
    assert mended.returncode == 3
    assert (mended.result["num_accepted"], mended.result["num_rejected"]) == (1, 1)
    opened = Index.open(index)
    assert "bad0.jpg" in opened
    assert (opened.manifest.counts.accepted, opened.manifest.counts.rejected) == (13, 1)


def test_rebuild_for_another_codec_reads_no_image(extracted: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    corpus, index = copies(extracted, tmp_path)
    direct = tmp_path / "direct"
    assert run_cli("extract", corpus, "--index", direct, "--model", model, "--variant", "int8", *LOCAL).returncode == 3
    hidden = corpus.rename(corpus.with_name("hidden"))
    try:
        ended = run_cli("rebuild", "--index", index, "--variant", "int8", *LOCAL)
    finally:
        hidden.rename(corpus)
    assert ended.returncode == 0, ended.stderr
    assert ended.result["way"] == "tokens"
    assert ended.result["diff"]["num_kept"] == 60
    assert_sound(index, contents(direct), 1)
    refused = run_cli("rebuild", "--index", index, "--variant", "float16", *LOCAL)
    assert refused.returncode == 1
    assert "--allow-lossy" in refused.error_line
    nothing = run_cli("rebuild", "--index", index, *LOCAL)
    assert (nothing.returncode, nothing.result["way"]) == (0, "nothing")


def test_rebuild_of_the_adapter_from_raw_tokens(extracted: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    corpus, index = extracted
    raw = tmp_path / "raw"
    assert run_cli("extract", corpus, "--index", raw, "--model", model, "--variant", "raw", *LOCAL).returncode == 3
    ended = run_cli("rebuild", "--index", raw, "--variant", "49kb", *LOCAL)
    assert ended.returncode == 0, ended.stderr
    assert ended.result["way"] == "raw"
    ours, theirs = Index.open(raw), Index.open(index)
    ids = theirs.ids()
    assert ours.ids() == ids
    # The vision tokens were rounded to float16 on their way.
    assert abs(ours.tokens(ids) - theirs.tokens(ids)).max() < 0.02


def test_a_killed_rebuild_resumes(extracted: tuple[Path, Path], tmp_path: Path) -> None:
    _, index = copies(extracted, tmp_path)
    old = contents(index)
    arguments = ("rebuild", "--index", index, "--variant", "int4", "--shard-rows", 8, *LOCAL)
    assert run_cli(*arguments, env={"EDJE_CRASH_AT": "journal.done:2"}).returncode == -9
    assert contents(index) == old
    ended = run_cli(*arguments)
    assert ended.returncode == 0, ended.stderr
    assert ended.result["run"]["num_resumed"] > 0
    assert ended.result["run"]["num_listed"] == 61
    assert set(contents(index)) == set(old)


def test_the_small_variant_trains_its_codebook_and_says_so(
    extracted: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    corpus, index = extracted[0], tmp_path / "index"
    arguments = ("extract", corpus, "--index", index, "--model", model, "--variant", "1kb", "--shard-rows", 16, *LOCAL)
    killed = run_cli(*arguments, env={"EDJE_CRASH_AT": "journal.done:2"})
    assert killed.returncode == -9
    assert "training opq16 on the first" in killed.stderr
    ended = run_cli(*arguments)
    assert ended.returncode == 3, ended.stderr
    assert "training" not in ended.stderr
    assert ended.result["num_resumed"] > 0
    assert Index.open(index).tokens(Index.open(index).ids()).shape == (60, 4, 32)
    assert len(list((index / "codecs").iterdir())) == 1


def test_estimate_of_a_corpus_and_of_a_number(extracted: tuple[Path, Path], model: Path) -> None:
    ended = run_cli("estimate", extracted[0], "--model", model, "--format", "json", "--num-probe", 16)
    assert ended.returncode == 0, ended.stderr
    assert ended.result["num_images"] == 61
    assert ended.result["total_s"] == pytest.approx(61 / ended.result["images_per_s"])
    offline = run_cli("estimate", "--num-images", 1_000_000, "--model", model, "--num-probe", 16)
    assert offline.returncode == 0, offline.stderr
    assert "1,000,000" in offline.stdout
    assert all(len(line) <= 80 for line in offline.stdout.splitlines())


def test_dry_run_writes_nothing(extracted: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    ended = run_cli("extract", extracted[0], "--index", tmp_path / "index", "--model", model, "--dry-run", *LOCAL)
    assert ended.returncode == 0, ended.stderr
    assert ended.result["num_listed"] == 61
    assert not (tmp_path / "index").exists()


def test_too_many_rejects_publish_nothing_and_can_go_on(model: Path, tmp_path: Path) -> None:
    corpus, index = write_corpus(tmp_path / "corpus", 6, 6), tmp_path / "index"
    arguments = ("extract", corpus, "--index", index, "--model", model, *LOCAL)
    ended = run_cli(*arguments, "--max-reject-fraction", 0.2)
    assert ended.returncode == 1
    assert "--max-reject-fraction" in ended.error_line
    assert not (index / "manifest.json").exists()
    more = run_cli(*arguments, "--warn-reject-fraction", 0.6)
    assert more.returncode == 0, more.stderr
    assert more.result["num_resumed"] > 0


# -- bad input ------------------------------------------------------------------------------------------


def _tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _jpeg(tmp_path: Path, seed: int) -> bytes:
    write_image(tmp_path / "one.jpg", seed)
    return (tmp_path / "one.jpg").read_bytes()


def test_a_missing_corpus(model: Path, tmp_path: Path) -> None:
    ended = run_cli("extract", tmp_path / "nowhere", "--index", tmp_path / "index", "--model", model)
    assert ended.returncode == 1
    assert "does not exist" in ended.error_line
    assert not (tmp_path / "index").exists()


def test_an_empty_corpus(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ended = run_cli("extract", tmp_path / "empty", "--index", tmp_path / "index", "--model", model, *LOCAL)
    assert ended.returncode == 1
    assert "no image" in ended.error_line
    assert json.loads(ended.stdout)["error"]["kind"] == "SourceNotFoundError"


def test_a_truncated_tar_and_dotted_keys(model: Path, tmp_path: Path) -> None:
    members = [(f"dir.v1/{number:03d}.left.jpg", _jpeg(tmp_path, number)) for number in range(5)]
    path = _tar(tmp_path / "part.tar", members)
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 11_000)
    ended = run_cli("extract", path, "--index", tmp_path / "index", "--model", model, *LOCAL)
    assert ended.returncode in (0, 3), ended.stderr
    assert any("end too early" in note for note in ended.result["notes"]), ended.result["notes"]
    ids = Index.open(tmp_path / "index").ids()
    assert "dir.v1/000.left" in ids


def test_repeated_keys_in_tars(model: Path, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for name in ("a", "b"):
        _tar(tmp_path / "tars" / f"{name}.tar", [("000.jpg", _jpeg(tmp_path, 1))])
    ended = run_cli("extract", tmp_path / "tars", "--index", tmp_path / "index", "--model", model, *LOCAL)
    assert ended.returncode == 1
    assert "stands at two places" in ended.error_line
    kept = run_cli(
        "extract", tmp_path / "tars", "--index", tmp_path / "index", "--model", model, "--on-duplicate", "first",
        "--restart", *LOCAL,
    )  # fmt: skip
    assert kept.returncode == 0, kept.stderr
    assert kept.result["num_accepted"] == 1


def test_a_parquet_file_without_the_named_column(model: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "picture": [_jpeg(tmp_path, 1)]}), tmp_path / "x.parquet")
    ended = run_cli(
        "extract", tmp_path / "x.parquet", "--index", tmp_path / "index", "--model", model, "--image-column", "jpg",
        *LOCAL,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "'jpg'" in ended.error_line or "jpg" in ended.error_line
    assert "picture" in ended.error_line


def test_an_index_of_another_model(extracted: tuple[Path, Path], tmp_path: Path) -> None:
    write_random_model(tmp_path / "other", size="tiny", seed=1)
    corpus, index = extracted
    ended = run_cli("extract", corpus, "--index", index, "--model", tmp_path / "other", *LOCAL)
    assert ended.returncode == 1
    assert "another backbone, adapter" in ended.error_line
    assert "rebuild" in ended.error_line


def test_a_resume_with_another_model_is_refused(extracted: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    write_random_model(tmp_path / "other", size="tiny", seed=1)
    corpus, index = extracted[0], tmp_path / "index"
    killed = run_cli(
        "extract", corpus, "--index", index, "--model", model, *LOCAL, env={"EDJE_CRASH_AT": "listing.done"}
    )
    assert killed.returncode == -9
    ended = run_cli("extract", corpus, "--index", index, "--model", tmp_path / "other", *LOCAL)
    assert ended.returncode == 1
    assert "another adapter, backbone" in ended.error_line
    assert "--restart" in ended.error_line


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder nobody may write to: by its rights, or for root by its file system."""
    target = tmp_path / "locked"
    target.mkdir()
    if os.getuid() != 0:
        target.chmod(0o500)
        yield target
        target.chmod(0o700)
        return
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,ro", "tmpfs", target], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("root may write everywhere and cannot mount a read-only file system here")
    yield target
    subprocess.run(["umount", target], check=False)


def test_a_read_only_target(extracted: tuple[Path, Path], model: Path, read_only: Path) -> None:
    ended = run_cli("extract", extracted[0], "--index", read_only / "index", "--model", model, *LOCAL)
    assert ended.returncode == 1
    assert "cannot write" in ended.error_line


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_a_gpu_that_is_not_there(extracted: tuple[Path, Path], model: Path, tmp_path: Path, executor: str) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    ended = run_cli(
        "extract", extracted[0], "--index", tmp_path / "index", "--model", model, "--num-gpus", 1,
        "--executor", executor,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "--num-gpus" in ended.error_line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--variant", "7kb"), "no variant"),
        (("--variant", "local"), "compressed one"),
        (("--limit", 0), ""),
        (("--max-reject-fraction", 2), "fraction from 0 to 1"),
    ],
)
def test_wrong_options_are_usage_errors(
    extracted: tuple[Path, Path], model: Path, tmp_path: Path, arguments: tuple[object, ...], expected: str
) -> None:
    ended = run_cli("extract", extracted[0], "--index", tmp_path / "index", "--model", model, *arguments)
    assert ended.returncode == 2
    assert expected in ended.stderr
    assert not (tmp_path / "index").exists()
