"""The chaos suite in short: whatever breaks, each job ends once, and no invariant is broken.

`scripts/chaos` runs it longer, with other seeds and on the other type of queue.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.schedule import Kind, schedule
from tests.chaos.suite import Plan, run


def _assert_whole(plan: Plan) -> None:
    outcome = run(plan)
    broken = outcome.verdict.broken
    told = [*broken, f"seed {plan.seed}; the time line:", *outcome.line.lines, str(plan.folder)]
    assert not broken, "\n".join(told)
    count = outcome.verdict.count
    assert count.ended == count.published > 0
    assert len(outcome.faults) > plan.faults / 2, "the faults have hardly been tried"


@pytest.mark.timeout(420)
def test_three_workers_end_every_job_once_through_thirty_faults(tmp_path: Path) -> None:
    _assert_whole(Plan(seed=4, faults=30, folder=tmp_path / "chaos"))


@pytest.mark.timeout(420)
def test_the_real_trainer_resumes_what_a_killed_worker_had_trained(tmp_path: Path) -> None:
    deaths = (Kind.WORKER_KILLED, Kind.CHILD_KILLED, Kind.PREEMPTED, Kind.S3_AWAY)
    _assert_whole(
        Plan(
            seed=14,
            faults=4,
            folder=tmp_path / "chaos",
            workers=1,
            real_trainer=True,
            lease=5.0,
            kinds=deaths,
        )
    )


def test_the_same_seed_draws_the_same_faults() -> None:
    drawn = [schedule(seed, 200, workers=3, lease=3.0) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {fault.kind for fault in drawn[0]} == set(Kind)
