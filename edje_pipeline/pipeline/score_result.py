"""What a scoring run says of itself at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edje_pipeline.progress import format_bytes, format_duration

EXIT_DONE, EXIT_WARNED = 0, 3


@dataclass(frozen=True)
class ScoreResult:
    """Summary of a finished run; `manifest` is the content of OUT/manifest.json."""

    out: str
    manifest: dict[str, Any]
    missing_warning: float

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any], out: str, missing_warning: float) -> ScoreResult:
        """Also of a run that was killed after it had published."""
        return cls(out, manifest, missing_warning)

    @property
    def num_pairs(self) -> int:
        return int(self.manifest["plan"]["num_pairs"])

    @property
    def num_missing(self) -> int:
        return int(self.manifest["plan"]["num_missing"])

    @property
    def missing_fraction(self) -> float:
        return self.num_missing / max(1, self.num_pairs + self.num_missing)

    @property
    def wall_s(self) -> float:
        return float(sum(self.manifest["timings"].values()))

    @property
    def pairs_per_s(self) -> float:
        """Of the pairs scored by this process, joining and regrouping included."""
        return float(self.manifest["num_pairs_scored_now"]) / max(self.wall_s, 1e-9)

    @property
    def result_paths(self) -> list[str]:
        """Of the Parquet files, relative to `out`."""
        return [entry["path"] for entry in self.manifest["files"]]

    @property
    def exit_code(self) -> int:
        return EXIT_WARNED if self.missing_fraction > self.missing_warning else EXIT_DONE

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": self.out,
            "missing_fraction": self.missing_fraction,
            "pairs_per_s": self.pairs_per_s,
            "wall_s": self.wall_s,
            **self.manifest,
        }

    def _memory(self) -> str:
        """Peaks; a worker in this process is the driver."""
        peaks = [("driver", self.manifest.get("driver_peak_bytes", 0))]
        if self.manifest["num_workers"]:
            peaks.append(
                (f"largest of {self.manifest['num_workers']} workers", self.manifest["stats"].get("peak_bytes", 0))
            )
        return "peak " + ", ".join(f"{name} {format_bytes(size)}" for name, size in peaks)

    def to_text(self) -> str:
        plan, stats, timings = self.manifest["plan"], self.manifest["stats"], self.manifest["timings"]
        seconds = ", ".join(f"{name[:-2]} {value:.1f}" for name, value in timings.items())
        inside = ", ".join(f"{name} {stats.get(f'{name}_s', 0):.1f}" for name in ("read", "wait", "score", "write"))
        speed = f"{self.pairs_per_s:,.1f} pairs/s ({self.manifest['device']}, {self.manifest['precision']})"
        num_read, bytes_read = stats.get("num_rows_read", 0), format_bytes(stats.get("bytes_read", 0))
        lines = [
            f"scored {self.num_pairs:,} pairs in {format_duration(self.wall_s)}: {speed}",
            f"  for       {plan['num_queries']:,} queries, {plan['num_images']:,} images",
            f"  read      {num_read:,.0f} stored images, {bytes_read}",
            f"  seconds   {seconds}",
            f"  workers   {inside}",
            f"  memory    {self._memory()}",
        ]
        if refined := self.manifest.get("refined"):
            lines.append(
                f"  refined   the best {refined['top']:,} of each query in float32: {refined['num_pairs']:,} pairs"
            )
        if plan["num_duplicates"]:
            lines.append(f"  repeated  {plan['num_duplicates']:,} candidates repeat a pair, which counts once")
        if plan["num_empty_queries"]:
            shown = ", ".join(plan["empty_queries"][:3])
            lines.append(f"  no candidates for {plan['num_empty_queries']:,} queries, such as {shown:.40}")
        if self.num_missing:
            lines.append(
                f"  missing   {self.num_missing:,} candidates ({self.missing_fraction:.2%}) of "
                f"{plan['num_missing_images']:,} images\n            listed in {self.out}/missing.parquet"
            )
        lines.append(f"results: {self.manifest['num_results']:,} rows\n  {self.out}/results/")
        return "\n".join(lines)
