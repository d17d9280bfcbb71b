"""The actions of the commands about jobs: each prints its result and returns an exit code."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from cli.jobs import order, screen
from cli.jobs.dead_queue import DeadLetter, go_through
from cli.jobs.follow import JobBar, follow
from cli.jobs.job_view import JobView, view
from cli.jobs.redrive import MOST, Redrive, Waiting
from cli.jobs.screen import print_details, print_jobs
from cli.jobs.steering import Steering, live_of, unended
from cli.jobs.styles import at_stake
from cli.jobs.task_ids import confirm, is_clear, resolve
from cli.server import Server
from jobs.layout import STYLE
from jobs.record import JobRecord
from services.records.listing import RecordListing, look_up, refusals_of
from utils.errors import BrokerError, ConfigurationError
from utils.wording import counted

DONE, FAILED, INTERRUPTED = 0, 1, 130
_UNSEEN = (
    "A message that no worker has taken yet has no record and is not found by its style: cancel it "
    "by its task id."
)


@dataclasses.dataclass(frozen=True, slots=True)
class Style:
    """Which jobs of a style are meant, where several are live.

    Attributes:
        style_id: The style.
        newest: The newest one.
        everything: All of them.
    """

    style_id: int
    newest: bool = False
    everything: bool = False


def publish(
    server: Server, folder: Path, style_id: int, *, wait: bool, as_json: bool, **ordered: Any
) -> int:
    """Order a training; with `wait` follow it to its end."""
    what = "If this job fails or is cancelled"
    stake = at_stake(server.models, server.s3, style_id, what)
    screen.warn([stake])
    with JobBar() as shown:
        placed = order.place(
            server.settings.broker,
            server.settings.storage,
            server.kinds,
            server.s3,
            folder,
            state_s3=server.state_s3,
            style_id=style_id,
            on_upload=shown.uploaded,
            **ordered,
        )
    if wait:
        return _wait(server, placed, as_json)
    images = counted(len(placed.images), "image")
    if as_json:
        screen.print_json(dataclasses.asdict(placed) | {"warning": stake})
    else:
        screen.say(f"published {placed.task_id}: style {style_id}, {images}")
    return DONE


def _wait(server: Server, placed: order.PlacedOrder, as_json: bool) -> int:
    if not as_json:
        screen.say(f"published {placed.task_id}; Ctrl-C ends the waiting, not the job")
    try:
        with JobBar() as shown:
            job = follow(server.state_s3, server.state, server.kinds, placed.task_id, shown.saw)
    except KeyboardInterrupt:
        screen.say(f"the job goes on: main.py jobs {placed.task_id}")
        return INTERRUPTED
    completed = job.ending == "complete"
    if as_json:
        screen.print_json(dataclasses.asdict(placed) | {"job": job.values()})
    else:
        told = ": ".join(filter(None, (placed.task_id, job.ending, job.model_url or job.detail)))
        screen.say(told, "green" if completed else "red")
    return DONE if completed else FAILED


def jobs(
    server: Server,
    tasks: list[str],
    style_id: int | None,
    *,
    live: bool,
    limit: int,
    as_json: bool,
) -> int:
    """Show jobs: these, those of a style, or the newest."""
    if tasks and (live or style_id is not None):
        raise ConfigurationError("Name tasks, or use --style and --live, not both.")
    if tasks:
        return _details(server, tasks, as_json)
    listing = RecordListing(server.state_s3, server.state)
    note = ""
    if style_id is None:
        found, more = listing.newest(limit, unsettled_only=live)
    else:
        of_style, unread = listing.of_subject(STYLE, str(style_id))
        if live:
            of_style = [each for each in of_style if each.record and not each.record.is_settled]
            unread = 0
        found, more = of_style[:limit], max(0, len(of_style) - limit)
        if unread:
            note = f"{counted(unread, 'older record was', 'older records were')} not read."
    views = [view(one, server.kinds) for one in found]
    if as_json:
        screen.print_json({"jobs": [job.values() for job in views], "more": more})
    elif not views:
        Console().print(f"no job {'has a record yet' if style_id is None else 'was found'}")
        if style_id is not None:
            screen.say(_UNSEEN.replace("cancel it", "look for it"))
    else:
        print_jobs(views, listing.ids, Console(highlight=False))
    if not as_json:
        if more:
            Console().print(f"and {more} more; --limit shows more of them")
        screen.warn([note])
    return FAILED if any(one.state == "unknown" for one in views) else DONE


def _details(server: Server, tasks: list[str], as_json: bool) -> int:
    views: list[JobView] = []
    for given in tasks:
        task_id = resolve(server.state_s3, server.state, given)
        (found,) = look_up(server.state_s3, server.state, [task_id])
        if found.version is not None:
            views.append(view(found, server.kinds))
        else:
            views += _refused(server, given) or [view(found, server.kinds)]
    if as_json:
        screen.print_json({"jobs": [job.values() for job in views], "more": 0})
    else:
        print_details(views, Console(highlight=False))
    return FAILED if any(one.state == "unknown" for one in views) else DONE


def _refused(server: Server, task_id: str) -> list[JobView]:
    """A message that was refused, by the task id that it gave."""
    if refusals := refusals_of(server.state_s3, server.state, task_id):
        return [view(each, server.kinds) for each in refusals]
    letters: list[DeadLetter] = []
    unknown = server.kinds.standing(None)
    try:
        go_through(server.settings.broker, letters.append, limit=MOST)
    except BrokerError as error:
        detail = f"there is no such record, and the dead queue cannot be looked at: {error}"
        return [JobView(task_id, unknown, detail=detail)]
    return [
        JobView(
            each.task_id,
            unknown,
            state="dead",
            attempts=each.attempts,
            ending=each.code,
            detail=each.reason,
        )
        for each in letters
        if each.task_id.startswith(task_id)
    ]


def cancel(
    server: Server, task: str | None, style: Style | None, *, yes: bool, as_json: bool
) -> int:
    """Have a job cancelled, or those of a style."""
    if (task is None) is (style is None):
        raise ConfigurationError("Name a task or a style: cancel TASK, or cancel --style N.")
    if style:
        return _cancel_style(server, style, yes=yes, as_json=as_json)
    assert task is not None
    task_id = resolve(server.state_s3, server.state, task)
    record = unended(server.state_s3, server.state, task_id, "cancel")
    if not is_clear(task, task_id):
        confirm(f"There is no job {task}; {task_id} begins like this. Cancel it?", yes=yes)
    stake = ""
    if record and record.style_id is not None:
        what = "When this job is cancelled"
        stake = at_stake(server.models, server.s3, record.style_id, what)
    screen.warn([stake])
    _warn_unpublished(_steering(server).cancel(record, task_id))
    looks_every = record.hold.lease_seconds / 4 if record else None
    if as_json:
        values = {"task_id": task_id, "looked_for_every_seconds": looks_every, "warning": stake}
        screen.print_json(values)
    elif looks_every is None:
        screen.say(
            f"{task_id} will be cancelled as soon as a worker takes it. No worker has seen it yet: "
            "is the id right?"
        )
    else:
        screen.say(_will_be_cancelled(task_id, looks_every))
    return DONE


def _cancel_style(server: Server, style: Style, *, yes: bool, as_json: bool) -> int:
    listing = RecordListing(server.state_s3, server.state)
    records = live_of(listing, STYLE, str(style.style_id))
    if not records:
        if as_json:
            screen.print_json({"cancelled": []})
        screen.say(f"No live job of style {style.style_id} was found. {_UNSEEN}", "yellow")
        return FAILED
    if style.newest:
        records = records[:1]
    if not as_json:
        known = {each.task_id: each for each in listing.unsettled}
        views = [view(known[each.task_id], server.kinds) for each in records]
        print_jobs(views, listing.ids, Console(stderr=True, highlight=False))
    if len(records) > 1 and not style.everything:
        _ask_for_all(style.style_id, records, yes)
    stake = at_stake(server.models, server.s3, style.style_id, "When a job is cancelled")
    screen.warn([stake])
    for record in records:
        _warn_unpublished(_steering(server).cancel(record, record.task_id))
        if not as_json:
            screen.say(_will_be_cancelled(record.task_id, record.hold.lease_seconds / 4))
    if not as_json:
        screen.say(_UNSEEN)
    if as_json:
        screen.print_json({"cancelled": [each.task_id for each in records], "warning": stake})
    return DONE


def _ask_for_all(style_id: int, records: list[JobRecord], yes: bool) -> None:
    try:
        confirm(f"Cancel all {len(records)} live jobs of style {style_id}?", yes=yes)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"Style {style_id} has {len(records)} live jobs "
            f"({', '.join(each.task_id for each in records)}). Nothing was cancelled: add --newest "
            "or --all, or name one of them."
        ) from error


def _will_be_cancelled(task_id: str, looks_every: float) -> str:
    return f"{task_id} will be cancelled; its worker looks every {looks_every:.0f} s"


def pause(server: Server, task: str, *, yes: bool, as_json: bool) -> int:
    """Pause a job."""
    task_id = resolve(server.state_s3, server.state, task)
    record = unended(server.state_s3, server.state, task_id, "pause")
    if not is_clear(task, task_id):
        confirm(f"There is no job {task}; {task_id} begins like this. Pause it?", yes=yes)
    _steering(server).pause(task_id)
    looks_every = record.hold.lease_seconds / 4 if record else None
    if as_json:
        screen.print_json({"task_id": task_id, "looked_for_every_seconds": looks_every})
    elif record is None:
        screen.say(
            f"{task_id} will be paused as soon as a worker takes it. No worker has seen it yet: "
            "is the id right?"
        )
    elif record.hold.released:
        screen.say(f"{task_id} is paused; `resume {task_id}` continues it")
    else:
        screen.say(
            f"{task_id} will be saved and paused; its worker looks every {looks_every:.0f} s"
        )
    return DONE


def resume(server: Server, task: str, *, yes: bool, as_json: bool) -> int:
    """Let a paused job go on."""
    task_id = resolve(server.state_s3, server.state, task)
    unended(server.state_s3, server.state, task_id, "resume")
    if not is_clear(task, task_id):
        confirm(f"There is no job {task}; {task_id} begins like this. Resume it?", yes=yes)
    problem = _steering(server).resume(task_id)
    _warn_unpublished(problem)
    if as_json:
        screen.print_json({"task_id": task_id, "warning": problem})
    else:
        screen.say(f"{task_id} is resumed; it continues when a worker takes its message")
    return DONE


def _steering(server: Server) -> Steering:
    return Steering(server.settings.broker, server.kinds, server.state_s3, server.state)


def _warn_unpublished(problem: str) -> None:
    if problem:
        screen.warn(
            [f"Its message could not be published ({problem}). A worker publishes it later."]
        )


def redrive(
    server: Server,
    tasks: list[str],
    *,
    everything: bool,
    include_superseded: bool,
    yes: bool,
    as_json: bool,
) -> int:
    """Look at what was given up, or send it back."""
    if tasks and everything:
        raise ConfigurationError("Name tasks, or use --all, not both.")
    work = Redrive(
        server.settings.broker,
        server.settings.storage,
        server.kinds,
        server.state_s3,
        models=server.s3,
    )
    if not tasks and not everything:
        found, more = work.look()
        screen.waiting(found, more, work.known_ids, as_json=as_json)
        return DONE
    found, _ = work.look(records=False)
    chosen = None if everything else _chosen(server, found, tasks, yes=yes)
    if chosen is not None:
        there = {each.task_id for each in found}
        found = [each for each in found if each.task_id in chosen]
        found += work.by_record(each for each in chosen if each not in there)
    if not as_json:
        _warn_before_sending_back(found, leave_out=everything and not include_superseded)
    done, more = work.send_back(chosen, include_superseded=include_superseded)
    screen.redriven(done, more, work.known_ids, as_json=as_json)
    missing = set(chosen or ()) - {one.task_id for one in done}
    if missing and not as_json:
        names = ", ".join(sorted(missing))
        screen.say(f"neither in the dead queue nor a job with a record: {names}", "yellow")
    sent = all(one.sent_back or one.left_out for one in done)
    return DONE if sent and not missing else FAILED


def _chosen(server: Server, found: list[Waiting], tasks: list[str], *, yes: bool) -> list[str]:
    others = {each.task_id for each in found if each.task_id}
    chosen = []
    for given in tasks:
        task_id = resolve(server.state_s3, server.state, given, others=others)
        if not is_clear(given, task_id):
            confirm(f"There is no job {given}; {task_id} begins like this. Send it back?", yes=yes)
        chosen.append(task_id)
    return list(dict.fromkeys(chosen))


def _warn_before_sending_back(found: list[Waiting], *, leave_out: bool) -> None:
    superseded = [each for each in found if each.superseded]
    if superseded:
        one = len(superseded) == 1
        what = (
            f"{'it is' if one else 'they are'} left out; --include-superseded sends "
            f"{'it' if one else 'them'} back, too"
            if leave_out
            else f"{'its model' if one else 'their models'} will go into the archive only"
        )
        jobs_of = (
            "1 job of a style that has" if one else f"{len(superseded)} jobs of styles that have"
        )
        screen.say(f"{jobs_of} a later order: {what}.", "yellow")
        for each in superseded:
            style = "" if each.style_id is None else f" of style {each.style_id}"
            screen.say(f"  {each.task_id}{style}: {each.superseded}")
    sent = [each for each in found if not (leave_out and each.superseded)]
    screen.warn(each.at_stake for each in sent)
