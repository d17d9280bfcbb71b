"""The short chaos suite: after any fault each job ends once, and no invariant is broken.

`scripts/chaos` runs it longer, with other seeds and on the other type of queue.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.schedule import WITHOUT_API, Kind, schedule
from tests.chaos.suite import Plan, run

_SLOW = {Kind.TWO_VERSIONS, Kind.BROKER_ALARM, Kind.BROKER_RESTARTED}
"""Left to `scripts/chaos`."""


def _assert_whole(plan: Plan) -> None:
    outcome = run(plan)
    broken = outcome.verdict.broken
    told = [*broken, f"seed {plan.seed}; the time line:", *outcome.line.lines, str(plan.folder)]
    assert not broken, "\n".join(told)
    count = outcome.verdict.count
    assert count.ended == count.published > 0
    assert sum(outcome.hits.values()) >= len(outcome.faults) / 2, "the faults struck too little"
    assert len(outcome.faults) > plan.faults / 2, "the faults have hardly been tried"


@pytest.mark.timeout(420)
def test_everything_of_each_job_is_where_it_must_be_after_twenty_faults(tmp_path: Path) -> None:
    kinds = tuple(kind for kind in WITHOUT_API if kind not in _SLOW)
    _assert_whole(Plan(seed=4, faults=20, folder=tmp_path / "chaos", kinds=kinds))


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
            destinies=(),
        )
    )


def test_the_same_seed_draws_the_same_faults() -> None:
    drawn = [schedule(seed, 200, workers=3, lease=3.0) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {fault.kind for fault in drawn[0]} == set(WITHOUT_API)
