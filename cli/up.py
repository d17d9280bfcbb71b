"""`main.py up`: API, worker, RabbitMQ and S3 on this machine, with one command."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import time
from pathlib import Path

import config
from cli.doctor import base_model, machine
from cli.doctor.findings import Finding, Verdict
from cli.program import EXIT_INTERRUPTED, console
from local.home import Home, opened
from local.machine import LOOK_SECONDS, OneMachine, Program
from utils.errors import ConfigurationError, TrainingServerError

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = "stand-in-for-sd15"
_REPLACED = ("broker", "storage", "webhooks")
"""Groups of settings that this machine's own servers decide."""
_DEFAULTS = {
    # A worker that was killed is replaced by one that waits for its lease.
    "LEASE_TTL_SECONDS": "20",
    "PROGRESS_INTERVAL_SECONDS": "5",
    "HTTP_PORT": "0",
}
NOTICE = "The base model is a stand-in: its images are noise."
_OF_THE_STAND_IN = {
    "STYLE_RESOLUTION": "64",
    "ALLOW_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "API_NOTICE": NOTICE,
}


def run(folder: Path, *, stand_in: bool) -> int:
    """Start everything, and stay until Ctrl-C or SIGTERM.

    Args:
        folder: The folder of all data.
        stand_in: Train a toy in place of a base model.

    Returns:
        The exit code.

    Raises:
        ConfigurationError: It runs already, a program is not installed, or no base model can train.
        TrainingServerError: A server did not start, or ends again and again.
    """
    given = config.child_environment({})
    program = Program(ROOT, int(given.get("API_PORT", "8000")), _environment)
    _stop_at_signals()
    try:
        with opened(folder, program.address) as home:
            settings = {
                name: value for name, value in _DEFAULTS.items() if name not in given
            } | _base_model(home, stand_in=stand_in)
            _serve(OneMachine(home, program, settings, _say), home, program, stand_in=stand_in)
    except KeyboardInterrupt:
        _say("Stopped. The data stay; the next `main.py up` continues.")
        return EXIT_INTERRUPTED
    return 0


def _serve(one: OneMachine, home: Home, program: Program, *, stand_in: bool) -> None:
    _say("Starting RabbitMQ, S3, the API and a worker.")
    with one.running() as secrets:
        if stand_in:
            _say(NOTICE)
        _say(f"Page: {program.address}/  (sign in with the key)")
        _say(f"API:  {program.address}  (reference at /docs)")
        _say(f"Key:  {secrets.api_key}")
        _say(f"Data: {home.folder}  (logs in logs/)")
        _say("Ctrl-C stops everything; jobs continue at the next start.")
        try:
            while True:
                time.sleep(LOOK_SECONDS)
                one.look()
        except KeyboardInterrupt:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must leave nothing behind
            _say("Stopping: the worker saves its job first.")
            raise


_environment = functools.partial(config.child_environment, without=_REPLACED)


def _base_model(home: Home, *, stand_in: bool) -> dict[str, str]:
    """The settings of the base model.

    Raises:
        ConfigurationError: It cannot be trained on this machine.
    """
    if stand_in:
        folder = home.folder / STAND_IN
        if not (folder / "stand-in.json").exists():
            _build_stand_in(folder)
        return {"BASE_MODEL": str(folder), **_OF_THE_STAND_IN}
    settings = config.load_local()
    environment = settings.trainer_environment()
    findings = [
        *base_model.examine(settings.trainer, environment),
        *machine.examine_gpu(environment, allow_cpu=settings.trainer.allow_cpu),
    ]
    if problem := next((each for each in findings if each.verdict is Verdict.FAIL), None):
        raise ConfigurationError(_refusal(problem))
    name = settings.trainer.base_model
    return {"BASE_MODEL": str(Path(name).absolute())} if Path(name).is_dir() else {}


def _refusal(problem: Finding) -> str:
    return (
        f"No base model can be trained on this machine. {problem.check}: {problem.detail} "
        f"{problem.remedy} To try the server with a toy whose images are noise, run "
        "`main.py up --stand-in`."
    )


def _build_stand_in(folder: Path) -> None:
    _say("Building the stand-in for a base model.")
    done = subprocess.run(
        [sys.executable, "-m", "training.style.stand_in_model", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise TrainingServerError(f"The stand-in could not be built: {done.stderr.strip()}")


def _stop_at_signals() -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, stop)


def _say(sentence: str) -> None:
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)
