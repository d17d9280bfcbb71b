"""The replacements of the product's guards by the mutants; see `tests.chaos.mutants`."""

# Taking something out means reaching inside.
# pylint: disable=protected-access,import-outside-toplevel

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

Make = Callable[[Any], Any]
"""Makes a replacement from the original."""


def instead(replacement: Any) -> Make:
    """The replacement, for any original value."""
    return lambda _original: replacement


def nothing(*_given: Any, **_how: Any) -> None:
    """Do nothing."""


def without_conditions(put: Any) -> Any:
    def wrapped(self: Any, *given: Any, **how: Any) -> Any:
        kept = {
            name: value for name, value in how.items() if name not in ("IfMatch", "IfNoneMatch")
        }
        return put(self, *given, **kept)

    return wrapped


def over_any_version(upload: Any) -> Any:
    return lambda self, *given, **how: upload(self, *given, **how | {"only_over": None})


def in_memory(_end: Any) -> Any:
    def wrapped(lease: Any, ending: Any, owed: Any = None) -> Any:
        lease._record = lease._record.ended(ending, owed)
        return lease._record.ending

    return wrapped


def acknowledged(_requeue: Any) -> Any:
    return classmethod(lambda cls: cls.ack())


def unpublished(which: Callable[[Any], bool]) -> Make:
    """Pretend that such publications were confirmed."""

    def make(publish: Any) -> Any:
        def wrapped(self: Any, publication: Any) -> None:
            if not which(publication):
                publish(self, publication)

        return wrapped

    return make


def attempts_uncounted(released: Any) -> Any:
    return lambda self, **how: released(self, **how | {"count_attempt": False})


def always_delivered(judge: Any) -> Any:
    def wrapped(reply: Any, detail: str) -> Any:
        from services.webhooks.answers import EndingOutcome

        return dataclasses.replace(judge(reply, detail), outcome=EndingOutcome.DELIVERED)

    return wrapped


def from_zero(_next: Any) -> Any:
    def wrapped(lease: Any) -> int:
        lease._sequence += 1
        return int(lease._sequence)

    return wrapped


def paid_before_it_is_published(_pay: Any) -> Any:
    def wrapped(self: Any, lease: Any, original: bytes) -> None:
        from services.broker.settlement import Publication

        if (owed := lease.record.owed) is None:
            return
        lease.paid()
        letter = Publication.to_dead(
            original,
            code=owed.code,
            message=owed.message,
            task_id=lease.record.task_id,
            attempts=owed.attempts,
        )
        self._publish(letter)

    return wrapped


def as_own_copy(put_off: Any) -> Any:
    """The copy of an order that was never claimed is marked as possibly claimed."""

    def wrapped(self: Any, *given: Any, **how: Any) -> Any:
        settlement = put_off(self, *given, **how)
        copies = tuple(
            dataclasses.replace(one, headers={**one.headers, "x-worker-copy": True})
            for one in settlement.publish
        )
        return dataclasses.replace(settlement, publish=copies)

    return wrapped


def acknowledged_where_held(look_at: Any) -> Any:
    def wrapped(self: Any, one: Any) -> Any:
        from services.broker.settlement import Settlement
        from services.records.job_records import HeldElsewhere

        if isinstance(self._records.adopt_ending(one.task_id), HeldElsewhere):
            return Settlement.ack()
        return look_at(self, one)

    return wrapped


def begun_with_the_last_try(write: Any) -> Any:
    """The lease counts from the answer, not from the beginning of the write."""

    def wrapped(self: Any, record: Any, deadline: float) -> None:
        write(self, record, deadline)
        self._began_at = time.monotonic()

    return wrapped


def every_header(_carried: Any) -> Any:
    def carried(self: Any) -> dict[str, Any]:
        return {name: value for name, value in self.headers.items() if isinstance(value, str | int)}

    return property(carried)


@contextlib.contextmanager
def without_limit(_self: Any) -> Iterator[None]:
    yield


def no_limits(rules: Any) -> Any:
    return {why: dataclasses.replace(rule, limit=None) for why, rule in rules.items()}


def stopped_between_two_files(_put_in_place: Any) -> Any:
    """A stop is obeyed after the first file too, and the folder is not rolled back."""

    def wrapped(
        self: Any, style: Any, run: Any, turn: Any, fence: Any, check: Callable[[], None]
    ) -> Any:
        from consumer.publishing.model_folder import Fence, persistently
        from consumer.publishing.model_publisher import Published

        class Obedient(Fence):
            """Asks for a stop before each write."""

            def check(self) -> None:
                check()
                super().check()

        del turn  # it gets no note
        obedient = Obedient(fence._lease, fence._turn)
        style.archive(style.look(), fence)
        persistently(lambda: style.put(run.folder, run.files, run.mark, obedient), fence)
        return Published(style.place(run.files[-1]).uri(self._url_scheme))

    return wrapped


def pruned_without_lease(_prune: Any) -> Any:
    """Delete everything except its own newest checkpoints, without regard to claims."""

    def wrapped(s3: Any, bucket: str, prefix: str, *, kept: Any, lease: Any) -> None:
        del lease
        own = tuple(f"{prefix}{name}/" for name in kept)
        there = [each.key for each in s3.list_objects(bucket, prefix)]
        s3.delete(
            bucket,
            [
                key
                for key in there
                if not key.startswith(own) and not key.endswith("lora.safetensors")
            ],
        )

    return wrapped


def any_version_copied(copy: Any) -> Any:
    return lambda self, *given, **how: copy(self, *given, **how | {"etag": None})


def in_a_later_transaction(put_out: Any) -> Any:
    """The message is written once the job is committed."""

    def wrapped(session: Any, row: Any, due_at: float | None = None) -> None:
        import sqlalchemy

        bind = session.get_bind()

        def write() -> None:
            from api.store.database import Writing

            with Writing(bind) as later:
                put_out(later, row, due_at)
                later.commit()

        def begin(_committed: Any) -> None:
            threading.Timer(0.5, write).start()

        sqlalchemy.event.listen(session, "after_commit", begin, once=True)

    return wrapped


def as_the_newest(change: Any) -> Any:
    """Each piece of news is applied as if nothing had come after it."""

    def wrapped(
        session: Any, services: Any, row: Any, kind: str, body: Any, _sequence: int
    ) -> bool:
        if row.status in ("succeeded", "failed", "cancelled"):
            row.status = "running"
        return bool(change(session, services, row, kind, body, row.sequence + 1))

    return wrapped


def jobs_of_all(_visible: Any) -> Any:
    def wrapped(_org_id: str) -> Any:
        import sqlalchemy

        from api.store.tables import JobRow

        return sqlalchemy.select(JobRow).where(JobRow.deleted_at.is_(None))

    return wrapped


def job_of_any(_get: Any) -> Any:
    def wrapped(session: Any, job_id: str, _org_id: str, *, lock: bool = False) -> Any:
        import sqlalchemy

        from api.store.tables import JobRow

        query = sqlalchemy.select(JobRow).where(JobRow.id == job_id)
        return session.scalar(query.with_for_update() if lock else query)

    return wrapped
