"""Programs that measure; `python -m benchmarks.run` runs them all. Results lie in benchmarks/results/.

Torch's threads sleep while they wait for one another, on every side of every comparison, as the program
itself sets them: on a machine that others use too, spinning threads measure the neighbours.
"""

from edje_pipeline.pipeline.threads import let_threads_sleep

let_threads_sleep()
