"""`python -m benchmarks.scrape_cost`: what twenty requests a second on /metrics cost training.

The whole worker runs, on private servers, with the stand-in model: a real RabbitMQ, an S3 server
and a backend. The trainer has its own core; the front desk, the servers and the scraper share
another. Stretches with and without scraping alternate (on off, off on, …), so that a drift
falls on both, and each pair is one comparison. Steps are counted between the trainer's own log
lines.

On a machine that does other work besides, `--realtime` (root only) keeps that off the trainer's
core: it runs before every ordinary process. Many short stretches are better there than few long
ones, and the median of the pairs is what counts.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from local.rabbitmq_node import RabbitMqNode
from sandbox.backend import Backend
from sandbox.photographs import photographs
from sandbox.s3_server import S3Server
from sandbox.worker_process import WorkerProcess
from tests.acceptance.world import World, log_lines, until
from training.style.stand_in_model import build_stand_in

Epoch = tuple[float, int]


class Scraper:
    """Asks for /metrics at a steady rate, as Prometheus does, only more often."""

    def __init__(self, port: int, per_second: float) -> None:
        self.answers = 0
        self._port, self._pause = port, 1 / per_second
        self._on, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def switch(self, on: bool) -> None:
        """Begin, or pause."""
        if on:
            self._on.set()
        else:
            self._on.clear()

    def close(self) -> None:
        """Ask no more."""
        self._over = True
        self._on.set()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            self._on.wait()
            due = time.monotonic() + self._pause
            if self._over:
                return
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
            connection.request("GET", "/metrics", headers={"Accept": "text/plain"})
            self.answers += connection.getresponse().status == 200
            connection.close()
            time.sleep(max(0.0, due - time.monotonic()))


def main() -> int:
    """Measure, and print one line a pair and the verdict."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scrape_cost", description=__doc__)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=7.0, help="of one stretch")
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument(
        "--realtime", action="store_true", help="no other process on its core (root)"
    )
    parsed = parser.parse_args()
    trainer_core, *rest = sorted(os.sched_getaffinity(0), reverse=True)
    if not rest:
        print("needs two cores", file=sys.stderr)
        return 2
    os.sched_setaffinity(0, rest)  # also for all child processes
    with tempfile.TemporaryDirectory(prefix="scrape-cost-") as name:
        folder = Path(name)
        with RabbitMqNode(folder / "broker") as broker, S3Server() as s3, Backend() as backend:
            base = build_stand_in(folder / "stand-in")
            world = World(broker, s3, backend, base, folder)
            world.photographs = tuple(
                world.upload(each.name, each.content) for each in photographs()
            )
            settings = {
                "RESOLUTION": str(parsed.resolution),
                "CHECKPOINT_INTERVAL": "1000",
                "PREVIEW_SHARE": "0",
            }
            with world.worker(**settings) as worker:
                return _measure(world, worker, trainer_core, parsed)


def _measure(world: World, worker: WorkerProcess, core: int, parsed: argparse.Namespace) -> int:
    port = until(lambda: log_lines(worker, "http_listening"))[0]["port"]
    images = list(world.photographs[:6])
    message = world.envelope(images=images, captions=None, parameters={"epochs": 1000})
    world.publish(message)
    until(lambda: len(log_lines(worker, "epoch_done")) > 3)
    _pin_trainer(worker, core, realtime=parsed.realtime)
    time.sleep(parsed.seconds)  # warm
    _compare(worker, Scraper(port, parsed.rate), parsed)
    return 0


def _compare(worker: WorkerProcess, scraper: Scraper, parsed: argparse.Namespace) -> None:
    costs, asked = [], 0.0
    for pair in range(parsed.pairs):
        speeds = {}
        for on in (False, True) if pair % 2 else (True, False):
            scraper.switch(on)
            before, began = scraper.answers, time.monotonic()
            speeds[on] = _speed(worker, parsed.seconds)
            if on:
                asked += (scraper.answers - before) / (time.monotonic() - began)
        costs.append(1 - speeds[True] / speeds[False])
        print(
            f"pair {pair + 1:3}: {speeds[False]:.2f} steps/s without, {speeds[True]:.2f} with, "
            f"cost {100 * costs[-1]:+.2f} %",
            flush=True,
        )
    scraper.close()
    middle, spread = statistics.fmean(costs), statistics.stdev(costs) / len(costs) ** 0.5
    print(
        f"{asked / parsed.pairs:.1f} requests a second cost {100 * middle:+.2f} % of the steps "
        f"(standard error {100 * spread:.2f}, median {100 * statistics.median(costs):+.2f}, "
        f"{parsed.pairs} pairs of {parsed.seconds:g} s)"
    )


def _pin_trainer(worker: WorkerProcess, core: int, *, realtime: bool) -> None:
    (trainer,) = (
        each
        for each in psutil.Process(worker.pid).children()
        if "training" in each.cmdline() and "--runs-fd" in each.cmdline()
    )
    for thread in trainer.threads():
        os.sched_setaffinity(thread.id, {core})
        if realtime:
            os.sched_setscheduler(thread.id, os.SCHED_FIFO, os.sched_param(1))


def _speed(worker: WorkerProcess, seconds: float) -> float:
    """Steps a second in the next `seconds`, between the first and the last epoch that end in it."""
    size = worker.log.stat().st_size
    time.sleep(seconds)
    with worker.log.open("rb") as log:
        log.seek(size)
        epochs = [_epoch(line) for line in log if b'"epoch_done"' in line and line.endswith(b"\n")]
    if len(epochs) < 2:
        raise RuntimeError(f"no two epochs ended within {seconds} s: choose longer stretches")
    (begin, first), (end, last) = epochs[0], epochs[-1]
    return (last - first) / (end - begin)


def _epoch(line: bytes) -> Epoch:
    values = json.loads(line[line.index(b"{") :])
    return datetime.datetime.fromisoformat(values["timestamp"]).timestamp(), values["step"]


if __name__ == "__main__":
    sys.exit(main())
