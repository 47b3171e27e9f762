"""The second pass of a scoring run: each query's best pairs again in float32.

A cheap precision decides who comes near the top, the exact one in which order: of a hundred
candidates a few are scored twice, and the first ranks are those of float32 although hardly any
work was done in it. (Libraries for vector search do the same with quantized vectors and call it
refining, as faiss does in IndexRefine.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edje_pipeline.pipeline.score_output import read_parts, read_query_ids
from edje_pipeline.pipeline.score_pass import PassResult, Workers, run_pass
from edje_pipeline.pipeline.score_plan import CANDIDATE_SCHEMA, PlanInfo, PlanLimits, Queries, write_plan
from edje_pipeline.pipeline.score_rank import rank_parts

if TYPE_CHECKING:
    from edje_pipeline.pipeline.score_store import ScoreStore
    from edje_pipeline.pipeline.score_worker import WorkerSpec
    from edje_pipeline.storage.index import Index


def refine(
    store: ScoreStore,
    info: PlanInfo,
    *,
    index: Index,
    read_queries: Callable[[], Queries],
    tokenize: Callable[[list[str]], Sequence[Sequence[int]]],
    limits: PlanLimits,
    spec: WorkerSpec,
    workers: Workers,
    top: int,
) -> tuple[PlanInfo, PassResult]:
    """Scores the `top` best pairs of each query again in float32, into `store.refined`.

    Resumed as the first pass is. The pairs are chosen once, when the first pass is whole; a part of it that has
    to be scored again later does not change the choice.

    Args:
        store: its first pass is complete.
        info: of the first pass.
        read_queries: gives the queries of the first pass.
    """
    journal = store.refined
    found: dict[str, Any] | None = journal.plan_info
    if found is None:
        best = rank_parts(
            read_parts(store.units),
            read_query_ids(store.units),
            num_pairs=info.num_pairs,
            memory_pairs=limits.memory_pairs,
            top_k=top,
        )
        chunks = (ranked.select(CANDIDATE_SCHEMA.names) for ranked in best)
        plan = write_plan(journal.plan_dir, index, read_queries(), chunks, tokenize=tokenize, limits=limits)
        journal.set_plan_info(plan.to_dict())
    else:
        plan = PlanInfo(**found)
    # Own kernels and the compiler are for the bulk of the work; few pairs would not pay for either.
    exact = replace(spec, precision="float32", kernels="torch", compiled=False)
    return plan, run_pass(journal, plan, exact, index, workers, name="refine")
