"""Peak memory and time of writing a plan, against the number of listed images.

    python -m benchmarks.listing_growth [10000 100000 1000000]

Each size runs in a process of its own: a list of made-up URIs is written, then listed into a plan.
Prints one line a size and the ratio of the last peak to the first.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(num_images: int) -> dict[str, float]:
    """Runs in its own process; returns seconds and peak resident bytes."""
    from edje_pipeline.storage.location import Location
    from edje_pipeline.storage.plan import write_plan
    from edje_pipeline.storage.sources import open_source

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "list.txt")
        with path.open("w") as stream:
            for number in range(num_images):
                stream.write(f"folder-{number % 1000:03d}/image-{number:09d}.jpg\n")
        started = time.monotonic()
        info = write_plan(open_source(str(path)), Location.parse(Path(folder, "plan")), unit_rows=256)
        assert info.num_rows == num_images
        seconds = time.monotonic() - started
        size = sum(part.stat().st_size for part in Path(folder, "plan").iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"num_images": num_images, "wall_s": seconds, "peak_bytes": peak, "plan_bytes": size}


def main() -> None:
    """Measures each size and prints the table."""
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(int(sys.argv[2]))))
        return
    sizes = [int(text) for text in sys.argv[1:]] or [10_000, 100_000, 1_000_000]
    results = []
    print(f"{'images':>12} {'seconds':>9} {'images/s':>10} {'peak MB':>9} {'plan B/image':>13}")
    for size in sizes:
        command = [sys.executable, "-m", "benchmarks.listing_growth", "--one", str(size)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        results.append(result)
        print(
            f"{size:12,} {result['wall_s']:9.1f} {size / result['wall_s']:10,.0f} "
            f"{result['peak_bytes'] / 1e6:9.0f} {result['plan_bytes'] / size:13.1f}"
        )
    print(f"peak of the largest over the smallest: {results[-1]['peak_bytes'] / results[0]['peak_bytes']:.2f}")


if __name__ == "__main__":
    main()
