"""The suite's own parts: each breaks only what it claims to break."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sandbox.backend import COMPLETE, Answer, ReceivedRequest
from tests.chaos import full_disk, mutants, mutation_run
from tests.chaos.__main__ import chosen
from tests.chaos.crash_points import API_POINTS, POINTS, STOP_POINTS
from tests.chaos.hits import Hits
from tests.chaos.reference import Destiny
from tests.chaos.schedule import Kind
from tests.chaos.tcp_proxy import Frames
from tests.chaos.windows import BackendMood, Window, endings

ROOT = Path(__file__).parents[2]


def _frame(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, 1, len(payload)) + payload + b"\xce"


def test_confirms_are_withheld_and_all_other_frames_pass_whole() -> None:
    ack = _frame(1, struct.pack(">HHQB", 60, 80, 1, 0))
    deliver = _frame(1, struct.pack(">HH", 60, 60) + b"rest")
    heartbeat = _frame(8, b"")
    stream = deliver + ack + heartbeat
    frames = Frames()
    passed, lost = b"", 0
    for byte in stream:
        more, some = frames.passed(bytes([byte]), without_confirms=True)
        passed, lost = passed + more, lost + some
    assert (passed, lost) == (deliver + heartbeat, 1)
    assert frames.passed(stream, without_confirms=False) == (stream, 0)


def test_a_write_is_cut_in_the_middle_only_in_a_work_folder_and_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io, "open", io.open)  # put back afterwards
    marker, work = tmp_path / "full", tmp_path / full_disk.WORK
    work.mkdir()
    cut: list[str] = []
    full_disk.cut_writes(marker, cut.append)
    (work / "a").write_bytes(b"12345678")
    marker.touch()
    with pytest.raises(OSError) as failed:
        (work / "b").write_bytes(b"12345678")
    assert failed.value.errno == errno.ENOSPC
    assert ((work / "a").read_bytes(), (work / "b").read_bytes()) == (b"12345678", b"1234")
    (tmp_path / "elsewhere").write_bytes(b"1234")
    assert cut == ["b"]


def test_a_stepped_clock_shifts_the_products_time_and_not_the_monotonic_one(tmp_path: Path) -> None:
    (tmp_path / "offset").write_text("150", encoding="ascii")
    code = """
import datetime, json, sys, time
from pathlib import Path
from jobs import hold
from tests.chaos.clock import Clock, shift
before = time.time(), time.monotonic(), datetime.datetime.fromisoformat(hold.utc_now())
steps = []
shift(Clock(Path(sys.argv[1]), steps.append))
after = time.time(), time.monotonic(), datetime.datetime.fromisoformat(hold.utc_now())
gone = [after[0] - before[0], after[1] - before[1], (after[2] - before[2]).total_seconds()]
print(json.dumps([*map(round, gone), steps]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "offset")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [150, 0, 150, [150.0]]


def test_every_mutant_names_a_symbol_of_the_product() -> None:
    assert len(mutants.MUTANTS) >= 15
    for mutant in mutants.MUTANTS:
        for symbol, make in mutant.changes:
            assert make(mutants.find(symbol)[2]) is not None, mutant.name
        if mutant.only != "nothing":
            assert chosen(mutant.only)[0], mutant.name


def test_a_symbol_that_is_gone_is_refused() -> None:
    with pytest.raises(mutants.SymbolGone, match="services.records.lease:Lease.gone"):
        mutants.find("services.records.lease:Lease.gone")


def test_results_of_other_code_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "mutants.json"
    result = mutation_run.Result(False, ["job-0001: lost"], 60.0)
    mutation_run.Results(path, "a").put("fence", result)
    assert mutation_run.Results(path, "a").get("fence") == result
    assert mutation_run.Results(path, "b").get("fence") is None


def test_words_select_kinds_and_points() -> None:
    assert chosen("SIGTERM with") == ((Kind.PREEMPTED,), POINTS, STOP_POINTS, API_POINTS)
    kinds, points, *_ = chosen("killed at before publish")
    assert (kinds, points) == ((Kind.CRASH_POINT,), ("before publish",))
    kinds, _, stops, _ = chosen("stopped at before delete")
    assert kinds == (Kind.STOP_POINT,)
    assert set(stops) == {"before delete checkpoints", "before delete staging"}
    kinds, *_, of_api = chosen("API killed at before commit")
    assert (kinds, of_api) == ((Kind.API_CRASH_POINT,), ("before commit",))


def test_a_late_answer_is_still_that_of_the_jobs_destiny() -> None:
    mood = BackendMood(Hits())
    mood.destinies["job"] = Destiny.NOT_FOUND
    request = ReceivedRequest(COMPLETE, "POST", {}, {"task_id": "job"}, 0.0, "id")
    until = time.monotonic() + 60.0

    def answer(fault: Answer) -> Answer | None:
        mood.calm()
        mood.add(Window(until, 1.0, random.Random(1), fault, endings, Kind.ENDING_SLOW))
        return mood(request)

    late = answer(Answer(delay=1.5))
    assert late is not None
    assert (late.status, late.delay) == (404, 1.5)
    assert answer(Answer(401)) == Answer(401)


def test_hits_are_counted_by_any_thread() -> None:
    hits = Hits()
    threads = [threading.Thread(target=hits.struck, args=("S3", 2)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hits.of("S3") == 40
