"""The curve of a run: one JSON object a line, and a picture of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edje_pipeline.storage.location import Location

NOT_PLOTTED = frozenset({"step", "phase", "wall_s", "pairs_per_s", "learning_rate"})


class MetricsLog:
    """`metrics.jsonl`; a resumed run drops the lines after its checkpoint, so that no step stands twice."""

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= resume_step] if resume_step else []
        Location.parse(path).write_bytes("".join(json.dumps(record) + "\n" for record in kept).encode())

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line, flushed."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a line that a kill has cut is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def plot_metrics(records: list[dict[str, Any]], target: Path) -> bool:
    """Draws losses and validation recall over steps into a PNG; False when matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    names = sorted({name for record in records for name, value in record.items()
                    if name not in NOT_PLOTTED and isinstance(value, (int, float))})  # fmt: skip
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    for name in names:
        axis = below if name.startswith("val_") else above
        points = [(record["step"], record[name]) for record in records if name in record]
        axis.plot(*zip(*points, strict=True), marker="." if axis is below else "", label=name)
    for axis, label in ((above, "loss"), (below, "validation recall, %")):
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    below.set_xlabel("step")
    with Location.parse(target).open_atomic() as stream:
        figure.savefig(stream, format="png", dpi=120)
    return True
