"""Training on one or many workers of a Ray cluster: the loop of trainer.py in Ray Train's process group.

Every worker reads model, captions and tokens itself and computes the whole batch plan; vision tokens
are gathered, gradients averaged. Worker 0 writes checkpoints and the model.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from edje_pipeline.errors import TrainingError
from edje_pipeline.training.collective import Collective
from edje_pipeline.training.run import TrainJob, TrainResult, finish, last_values, prepare
from edje_pipeline.training.trainer import Trainer


def worker_loop(config: dict[str, Any]) -> None:
    """What each worker runs. `config["job"]` is the TrainJob."""
    import torch.distributed as dist

    job: TrainJob = config["job"]
    collective = Collective.from_process_group()
    if collective.rank:
        # The first worker fills the token cache; the others find it there.
        dist.barrier()
    prepared = prepare(job, collective)
    if not collective.rank:
        dist.barrier()
    Trainer(job.recipe, prepared.state).run()
    if not collective.rank:
        finish(prepared)
    dist.barrier()


def train_with_ray(
    job: TrainJob, *, num_workers: int, use_gpu: bool = False, address: str | None = None
) -> TrainResult:
    """Trains on `num_workers` workers; a run that was killed is resumed by the same call.

    Args:
        job: `out` must be a directory that all workers see.
        num_workers: processes; batch sizes count for each of them.
        use_gpu: one GPU a worker.
        address: of a running cluster; None starts one here.

    Raises:
        TrainingError: a worker failed; with its message.
    """
    from edje_pipeline.pipeline import ray_bridge

    begun = time.monotonic()
    with ray_bridge.session(address):
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        resources = None if use_gpu else {"CPU": 1}
        trainer = TorchTrainer(
            worker_loop,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources),
            run_config=RunConfig(name="edje-train", storage_path=str((Path(job.out) / "ray").resolve())),
        )
        try:
            trainer.fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            raise TrainingError(f"training on {num_workers} workers failed: {_reason(error)}") from error
    out = Path(job.out)
    return TrainResult(job.out, str(out / "model"), job.recipe.total_steps, time.monotonic() - begun, last_values(out))


def _reason(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    messages = [str(failure).strip().splitlines()[-1] for failure in failures.values() if str(failure).strip()]
    return "; ".join(dict.fromkeys(messages)) or str(error).strip().splitlines()[-1]
