"""Guards of the product that are removed, one at a time, to test that the suite notices.

A suite that passes proves something only if it fails without what it tests. A mutant names the
symbols that it changes as `module:Class.attribute` and what they become, so that moved lines do not
break it; a missing symbol is an error. It also names the faults and jobs that reveal it, and the
text of the finding: a run that fails for another reason does not count.

`scripts/chaos --mutants` runs them all (`tests.chaos.mutation_run`).
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

from tests.chaos import mutations as change
from tests.chaos.mutations import Make


class SymbolGone(Exception):
    """A mutant names something that the product does not have any more."""


@dataclasses.dataclass(frozen=True, slots=True)
class Mutant:
    """One guard less.

    Attributes:
        name: On the command line.
        promise: The promise that it breaks.
        changes: Symbol and replacement.
        finding: A regular expression for the text of a finding.
        only: Words of the faults and named points that bring it to light; none for `nothing`.
        faults: How many.
        destinies: Words of the destinies.
        jobs: So many jobs at least.
        workers: How many.
        seed: Of the run.
        one_style: All jobs are of one style.
        one_at_a_time: A fault waits until the one before is over.
        epochs: Fewest and most epochs of a job.
        with_api: The run has an API.
    """

    name: str
    promise: str
    changes: tuple[tuple[str, Make], ...]
    finding: str
    only: str = "nothing"
    faults: int = 0
    destinies: str = "none"
    jobs: int = 0
    workers: int = 2
    seed: int = 1
    one_style: bool = False
    one_at_a_time: bool = False
    epochs: tuple[int, int] = (10, 30)
    with_api: bool = False

    @property
    def control(self) -> tuple[str, ...]:
        """The arguments of the run without the mutant; mutants without faults share one run."""
        if self.only != "nothing":
            return self.plan
        plain = ("--seed", "1", "--only", "nothing", "--workers", "2", "--jobs", "8")
        return (*plain, "--with-api") if self.with_api else plain

    @property
    def plan(self) -> tuple[str, ...]:
        """The arguments of its run."""
        return (
            *("--seed", str(self.seed), "--only", self.only, "--faults", str(self.faults)),
            *("--destinies", self.destinies, "--jobs", str(self.jobs)),
            *("--workers", str(self.workers), "--settle-seconds", "30"),
            *("--epochs", *map(str, self.epochs)),
            *(("--one-style",) if self.one_style else ()),
            *(("--one-at-a-time",) if self.one_at_a_time else ()),
            *(("--with-api",) if self.with_api else ()),
        )


def apply(name: str, *, of_api: bool = False) -> None:
    """Change this process.

    Args:
        name: The mutant.
        of_api: This process is an API server, and not a worker.

    Raises:
        SymbolGone: Something that the mutant names is not there.
    """
    for symbol, make in BY_NAME[name].changes:
        if symbol.startswith("api.") is not of_api:
            continue
        owner, attribute, original = find(symbol)
        setattr(owner, attribute, make(original))


def find(symbol: str) -> tuple[Any, str, Any]:
    """The owner, the name and the value of a symbol, `module:Class.attribute`.

    Raises:
        SymbolGone: It is not there.
    """
    module, _, path = symbol.partition(":")
    *owners, attribute = path.split(".")
    try:
        owner: Any = importlib.import_module(module)
        for name in owners:
            owner = getattr(owner, name)
        return owner, attribute, inspect.getattr_static(owner, attribute)
    except (ImportError, AttributeError) as error:
        raise SymbolGone(f"{symbol} is not there: {error!r}") from error


_PUBLISH = "services.broker.client:Link.publish"

MUTANTS = (
    Mutant(
        "conditional-writes",
        "of two workers that claim a job at once, one gets it",
        (
            ("services.s3.s3_service:S3Service._put", change.without_conditions),
            ("consumer.life.state_guard:StateGuard.test", change.instead(lambda _self: True)),
        ),
        "duplicated|trained after|was taken from it|sequence",
        only="published twice",
        faults=6,
        workers=3,
        seed=318,  # each time a new message, which two idle workers get at once
        epochs=(4, 8),
    ),
    Mutant(
        "fence",
        "a worker that slept through its lease stops, and changes nothing more",
        (
            ("services.records.lease:Lease.check", change.instead(change.nothing)),
            ("services.records.lease:Lease._lose", change.instead(change.nothing)),
            ("services.s3.s3_service:S3Service.upload_file", change.over_any_version),
        ),
        "was taken from it|several runs|claims|duplicated",
        only="worker frozen",
        faults=3,
    ),
    Mutant(
        "confirms",
        "what the broker has not taken is published again",
        (
            (
                "pika.adapters.blocking_connection:BlockingChannel.confirm_delivery",
                change.instead(change.nothing),
            ),
        ),
        "lost; .*dead_letters",
        only="dead queue deleted",
        faults=4,
        destinies="message refused,answered 404",
    ),
    Mutant(
        "record-before-ack",
        "an ending is in the record before anybody is told of it",
        (("services.records.job_lease:JobLease.end", change.in_memory),),
        "duplicated|trained after|lost|misplaced",
        only="killed at after webhook complete",
        faults=5,
    ),
    Mutant(
        "stop-acknowledges",
        "a worker that stops returns its message",
        (("services.broker.settlement:Settlement.requeue", change.acknowledged),),
        "only the sweep",
        only="SIGTERM with",
        faults=4,
    ),
    Mutant(
        "put-off-publishes-nothing",
        "a message that is put off comes back",
        ((_PUBLISH, change.unpublished(lambda one: one.delay_seconds is not None)),),
        "only the sweep|lost",
        only="worker killed",
        faults=3,
        destinies="given up",
    ),
    Mutant(
        "no-dead-letters",
        "nothing is dropped: what can go no further is in the dead queue",
        ((_PUBLISH, change.unpublished(lambda one: str(one.queue) == "dead")),),
        "lost; .*dead_letters",
        destinies="refused,answered 400",
    ),
    Mutant(
        "attempts-without-limit",
        "a job that fails again and again is given up",
        (("jobs.record:JobRecord.released", change.attempts_uncounted),),
        "given up.*lost",
        destinies="given up",
    ),
    Mutant(
        "cancel-file-ignored",
        "a cancel file cancels its job",
        (("services.records.job_lease:JobLease.look_for_cancel", change.instead(change.nothing)),),
        "expected failed CANCELLED, found complete",
        destinies="cancelled by file",
    ),
    Mutant(
        "checkpoint-not-verified",
        "a job resumes from the newest checkpoint that is whole",
        (("consumer.life.checkpoint_uploads:verify", change.instead(change.nothing)),),
        "repeated",
        only="checkpoint damaged",
        faults=3,
        epochs=(30, 40),
    ),
    Mutant(
        "not-cleared-up",
        "an ended job leaves what the protocol says, and no more",
        (
            ("consumer.pipeline:clear_up", change.instead(lambda *_: True)),
            ("consumer.worker:clear_up", change.instead(lambda *_: True)),
        ),
        "checkpoints: expected",
        destinies="cancelled by an answer",
    ),
    Mutant(
        "any-answer-delivers",
        "an ending is told until the backend has taken it",
        (("services.webhooks.webhook_service:judge_ending", change.always_delivered),),
        "delivery: expected set_aside, found delivered",
        destinies="answered 400",
    ),
    Mutant(
        "sequence-without-claim",
        "news of a later claim have a later sequence",
        (("services.records.job_lease:JobLease.next_sequence", change.from_zero),),
        "is of claims",
    ),
    Mutant(
        "put-off-without-limit",
        "a message that nobody can ever handle becomes a dead letter",
        (("consumer.life.put_offs:_RULES", change.no_limits),),
        "record damaged.*lost",
        destinies="record damaged",
    ),
    Mutant(
        "copy-not-owed",
        "the dead queue gets its copy though the worker dies before it is published",
        (("consumer.life.endings:Endings._pay", change.paid_before_it_is_published),),
        "lost; .*dead_letters",
        only="killed at before publish",
        faults=5,
        destinies="ending answered 400",
        jobs=8,
    ),
    Mutant(
        "unclaimed-order-is-a-copy",
        "an order that was never claimed is never taken for a duplicate",
        (("consumer.life.put_offs:PutOffs.put_off", change.as_own_copy),),
        "second order.*lost",
        destinies="ordered again",
    ),
    Mutant(
        "held-ending-acknowledged",
        "a message stays until its job's ending is delivered",
        (("consumer.life.endings:Endings._look_at", change.acknowledged_where_held),),
        "only the sweep",
        only="killed at before webhook complete",
        faults=4,
    ),
    Mutant(
        "retry-after-ignored",
        "a backend that asks for time gets it",
        (("consumer.life.endings:parking_delay", change.instead(lambda delays, *_: delays[0])),),
        "though the backend asked for",
        only="long Retry-After",
        faults=6,
        destinies="fails before",
        jobs=10,
    ),
    Mutant(
        "lease-from-the-last-try",
        "a lease begins with the first try of its write",
        (("services.records.lease:Lease._write", change.begun_with_the_last_try),),
        "believed to last longer",
        only="answers lost after the write",
        faults=4,
    ),
    Mutant(
        "confirm-without-limit",
        "a confirm that never comes stops no worker",
        (
            (
                "services.broker.client:AnswerLimit.__call__",
                change.instead(change.without_limit),
            ),
        ),
        "takes no job any more|lost|only the sweep",
        only="confirms lost",
        faults=5,
        destinies="given up,refused",
    ),
    Mutant(
        "every-header-carried",
        "a copy fits into a frame, and one that does not never blocks others",
        (("services.broker.settlement:Delivery.carried_headers", change.every_header),),
        "given up.*(lost|misplaced)|in the dead queue|messages wait",
        destinies="given up",
    ),
    Mutant(
        "stopped-between-two-files",
        "a style's folder is always of one run",
        (
            (
                "consumer.publishing.model_publisher:ModelPublisher._put_in_place",
                change.stopped_between_two_files,
            ),
        ),
        "cancelled while it publishes.*misplaced|several runs|has only",
        destinies="while it publishes",
    ),
    Mutant(
        "size-not-checked",
        "a job that is too large fails, before it fills any disk",
        (("consumer.pipeline:require_room", change.instead(change.nothing)),),
        "expected failed JOB_TOO_LARGE",
        destinies="exceeds the disk",
    ),
    Mutant(
        "pruned-without-lease",
        "a worker that slept deletes no checkpoint of its successor",
        (("consumer.life.checkpoint_uploads:prune", change.pruned_without_lease),),
        "its record points to checkpoint|repeated",
        only="stopped at before list checkpoints",
        faults=3,
        workers=3,
        seed=1091,  # long stops, early in a job, of the workers that are not the one with `--once`
        one_at_a_time=True,  # so that another worker is awake to take the job over
        epochs=(40, 50),
    ),
    Mutant(
        "any-version-archived",
        "a publisher that slept does not overwrite the archive of an older model",
        (
            ("services.s3.s3_service:S3Service.copy", change.any_version_copied),
            ("consumer.publishing.model_folder:Fence.renew", change.instead(change.nothing)),
        ),
        "is not what was trained|is of claims|has only|model: expected",
        only="stopped at before copy",
        faults=4,
        jobs=8,
        workers=3,
        one_style=True,
    ),
    Mutant(
        "outbox-apart",
        "a job and its message are created in one transaction",
        (("api.store.jobs:put_out", change.in_a_later_transaction),),
        "lost|not settled",
        only="API killed at before order to S3",
        faults=4,
        jobs=10,
        with_api=True,
    ),
    Mutant(
        "any-news-applies",
        "older news never changes a job back",
        (("api.life.news:change", change.as_the_newest),),
        "state after its ending|the API says|has ended",
        only="late, twice",
        faults=4,
        jobs=10,
        with_api=True,
    ),
    Mutant(
        "nothing-adopted",
        "the API takes over a job that its database does not know",
        (("api.life.news:adopt", change.instead(lambda *_: False)),),
        "has not adopted it",
        destinies="has no id,fails midway",
        jobs=10,
        with_api=True,
    ),
    Mutant(
        "every-organisation-sees-all",
        "an organisation sees only its own jobs",
        (
            ("api.store.jobs:visible", change.jobs_of_all),
            ("api.store.jobs:get", change.job_of_any),
        ),
        "org_(one|two) sees",
        with_api=True,
        jobs=6,
    ),
)
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
NAMES = tuple(BY_NAME)
