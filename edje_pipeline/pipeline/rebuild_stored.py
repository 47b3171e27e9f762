"""The part of a rebuild that starts from stored tokens; see stored_run.py for its stages."""

from __future__ import annotations

import time
from dataclasses import replace

from edje_pipeline.pipeline.image_run import DEFAULT_BATCH, RunReport, RunRequest
from edje_pipeline.pipeline.job import UNIT_BYTES, Job, choose_shard_rows
from edje_pipeline.pipeline.model_choice import NO_ADAPTER
from edje_pipeline.pipeline.runner import RunOutcome, check_devices, executing, interruptible, run_units
from edje_pipeline.pipeline.stored_run import StoredRows, keep_rejects, transcode_stages, vision_token_stages
from edje_pipeline.pipeline.train_codec import default_sample_images, sample_tokens, train_from_tokens
from edje_pipeline.storage.codecs import Codec, Float16Codec, codec_to_bytes, read_codec_file, save_codec
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.plan import PlanInfo
from edje_pipeline.storage.publish import publish
from edje_pipeline.storage.staging import Staging


def run_stored(request: RunRequest, old: Index) -> RunReport:
    """Makes and publishes a snapshot from the tokens of `old`; the same call again resumes."""
    check_devices(request.executor)
    with interruptible(), Staging.begin(
        request.index, fingerprints=request.fingerprints, config=request.config, restart=request.restart,
        purpose=request.action,
    ) as staging:  # fmt: skip
        rows = StoredRows(old)
        plan = PlanInfo(rows.num_rows, len(old.shards), 1, "", request.head_source, f"tokens in {old.location}")
        if staging.already_published is not None:
            counts = staging.already_published.run_counts
            return RunReport(
                staging.already_published, plan, RunOutcome(), counts["listed"], counts["accepted"],
                counts["rejected"], was_published_before=True,
            )  # fmt: skip
        return _run(request, staging, rows, plan)


def _run(request: RunRequest, staging: Staging, rows: StoredRows, plan: PlanInfo) -> RunReport:
    old = rows.index
    staging.set_plan_info(plan.to_dict())
    dropped = len(staging.verify_staged()) if staging.is_resumed else 0
    resumed = staging.covered.num_rows
    if resumed:
        request.say(f"resuming run {staging.run_id}: {resumed:,} of {plan.num_rows:,} rows are done")
    from_raw = old.manifest.fingerprints["adapter"] == NO_ADAPTER and request.choice.use_adapter
    keep_rejects(staging, rows)
    outcome = RunOutcome()
    codec = request.choice.codec
    if codec is None and not from_raw:
        codec = _trained(staging, request, old)
    with executing(request.executor, block_bytes=UNIT_BYTES) as execution:
        job = Job(
            index=staging.index,
            run_id=staging.run_id,
            plan_dir=staging.plan_dir,
            codec=codec or Float16Codec(request.choice.num_tokens, request.choice.dim),
            embedding_dim=request.choice.embedding_dim,
            unit_rows=1,
            shard_rows=request.compute.shard_rows or choose_shard_rows(request.choice.payload_bytes, plan.num_rows),
            model=request.choice.location,
            device="cuda" if execution.machine.num_gpus and from_raw else "cpu",
            precision=request.compute.precision,
            compile_model=request.compute.compile_model,
            batch_size=request.compute.batch_size or DEFAULT_BATCH["cuda" if execution.machine.num_gpus else "cpu"],
            num_threads=execution.machine.threads_per_encoder,
            old_snapshot=old.snapshot,
            old_index=old.location,
        )
        if codec is None:
            codec = _trained(staging, request, old, job)
            job = replace(job, codec=codec)
        stages = (vision_token_stages if from_raw else transcode_stages)(job, execution.machine)
        outcome = run_units(
            staging, job, stages, execution, num_rows=plan.num_rows, label=request.label, quiet=request.quiet,
            make_units=rows.units,
        )  # fmt: skip
    outcome.num_dropped_receipts = dropped
    save_codec(codec, staging.index)
    timings = {"compute_s": outcome.metrics.wall_s}
    head = request.choice.head(
        codec, fingerprints=request.fingerprints, source=request.head_source, config=request.config, timings=timings
    )
    started = time.monotonic()
    manifest = publish(staging, head=head, mode="new", action=request.action)
    timings["publish_s"] = time.monotonic() - started
    accepted = sum(receipt.num_accepted for receipt in staging.receipts)
    rejected = sum(receipt.num_rejected for receipt in staging.receipts)
    return RunReport(manifest, plan, outcome, resumed, accepted, rejected, timings=timings)


def _trained(staging: Staging, request: RunRequest, old: Index, job: Job | None = None) -> Codec:
    """The codebook of this run: from staging, else trained on stored tokens (through the adapter for `job`)."""
    place = staging.plan_dir.child("codec.safetensors")
    if place.exists():
        return read_codec_file(place)
    choice = request.choice
    request.say(f"no codebook was given: training {choice.codec_spec} on a sample of the stored tokens")
    tokens = sample_tokens(old, default_sample_images(choice.num_tokens))
    if job is not None:
        from edje_pipeline.pipeline.workers import make_encoder

        plain = Float16Codec(choice.num_tokens, choice.dim)
        encoder = make_encoder(replace(job, codec=plain), with_backbone=False)
        tokens = plain.decode(encoder.encode_vision_tokens(tokens.astype("float16")).payload)
    codec = train_from_tokens(tokens, choice.codec_spec)
    place.write_bytes(codec_to_bytes(codec))
    return codec
