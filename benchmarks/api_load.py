"""Load on the API: `python -m benchmarks.api_load`. Server and generator share the machine.

A real PostgreSQL with many finished jobs, a real S3 and a real RabbitMQ; the server is a process of
`main.py api`, and admission is active. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import sqlalchemy

from local.rabbitmq_node import RabbitMqNode
from sandbox.postgres_node import PostgresNode
from sandbox.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server

ROOT = Path(__file__).resolve().parent.parent
PORT = 8791
BUCKET = "benchmark"
_FILL = """
INSERT INTO jobs (id, org_id, kind, subject, tags, metadata, base_model, training_files,
  validation_files, parameters, hyperparameters, message, min_level, status, priority, admitted_at,
  sequence, progress, attempts, result, created_at, started_at, finished_at, heard_at,
  order_kept_at)
SELECT 'ftjob-' || lpad(to_hex(n), 24, '0'), 'org_bench', 'style', n::text, '["old"]', '{"n": "1"}',
  'sd15', '["file-1"]', '[]', '{}', '{}', '', 0, 'succeeded', 0, n, 1000005, '{}', 1, '{}', n,
  n, n + 60, n, n
FROM generate_series(1, :rows) AS n
"""


STREAM_SECONDS = 10.0
_TRANSACTIONS = sqlalchemy.text(
    "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
)


@dataclasses.dataclass(slots=True)
class Measured:
    """Latencies in seconds, and statuses."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    statuses: dict[int, int] = dataclasses.field(default_factory=dict)

    def add(self, status: int, seconds: float) -> None:
        """Note one answer."""
        self.seconds.append(seconds)
        self.statuses[status] = self.statuses.get(status, 0) + 1

    def summary(self) -> dict[str, Any]:
        """Percentiles in milliseconds, and counts."""
        ordered = sorted(self.seconds)

        def at(share: float) -> float:
            return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)

        return {
            "requests": len(ordered),
            "p50_ms": at(0.5),
            "p99_ms": at(0.99),
            "max_ms": at(1.0),
            "statuses": self.statuses,
        }


@contextmanager
def server(
    database_url: str, s3: S3Server, rabbitmq: RabbitMqNode, folder: Path
) -> Iterator[tuple[int, str]]:
    """A server process. Yields its process id and an admin key."""
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        "AWS_STORAGE_BUCKET_NAME": BUCKET,
        "AWS_ENDPOINT_URL_S3": s3.endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
        "AWS_S3_REGION_NAME": REGION,
        "RABBITMQ_PORT": str(rabbitmq.port),
        "INTERNAL_API_TOKEN": secrets.token_hex(24),
        "API_DATABASE_URL": database_url,
        "API_PORT": str(PORT),
        "API_REQUESTS_PER_MINUTE": "1000000",
        "API_CREATES_PER_MINUTE": "1000000",
        "LOG_LEVEL": "WARNING",
    }
    program = [sys.executable, str(ROOT / "main.py"), "api"]
    made = subprocess.run(
        [*program, "keys", "create", "--org", "org_bench", "--scope", "admin"],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    with (
        (folder / "api.log").open("wb") as log,
        subprocess.Popen(program, env=environment, cwd=folder, stdout=log, stderr=log) as process,
    ):
        try:
            for _ in range(300):
                with suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{PORT}/ready").status_code == 200:
                        break
                time.sleep(0.1)
            yield process.pid, made.stdout.strip().splitlines()[-1]
        finally:
            process.terminate()
            process.wait(20)


# pylint: disable-next=too-many-locals
async def load(key: str, arguments: argparse.Namespace, pid: int) -> dict[str, Any]:
    """Send reads and creates at fixed rates, independent of the latency, and measure."""
    reads, creates, memory = Measured(), Measured(), list[float]()
    headers = {"Authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=100, max_keepalive_connections=100)
    process = psutil.Process(pid)
    used, own = _cpu_seconds(process), time.process_time()
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{PORT}", headers=headers, limits=limits, timeout=60
    ) as client:
        file = await client.post("/v1/files", files={"file": ("a.png", b"image")})
        order = {"kind": "style", "model": "sd15", "training_files": [file.json()["id"]]}
        made = (await client.post("/v1/jobs", json=order)).json()["id"]
        paths = (f"/v1/jobs/{made}", "/v1/jobs", "/v1/jobs?status=succeeded", "/v1/files")

        async def send(into: Measured, method: str, path: str, **more: Any) -> None:
            begun = time.perf_counter()
            try:
                status = (await client.request(method, path, **more)).status_code
            except httpx.HTTPError:
                status = 0
            into.add(status, time.perf_counter() - begun)

        async def at_rate(rate: float, act: Any) -> None:
            begun, tasks = time.perf_counter(), []
            for number in range(int(rate * arguments.seconds)):
                pause = begun + number / rate - time.perf_counter()
                if pause > 0:
                    await asyncio.sleep(pause)
                tasks.append(asyncio.create_task(act(number)))
                if number % int(rate * 5) == 0:
                    memory.append(process.memory_info().rss / 1024**2)
            await asyncio.gather(*tasks)

        await asyncio.gather(
            at_rate(arguments.reads, lambda n: send(reads, "GET", paths[n % len(paths)])),
            at_rate(arguments.creates, lambda _: send(creates, "POST", "/v1/jobs", json=order)),
        )
    requests = len(reads.seconds) + len(creates.seconds)
    return {
        "server_cpu_ms_per_request": round(1000 * (_cpu_seconds(process) - used) / requests, 2),
        "generator_cpu_ms_per_request": round(1000 * (time.process_time() - own) / requests, 2),
        "reads": reads.summary(),
        "creates": creates.summary(),
        "memory_mib": [round(value, 1) for value in memory[:: max(1, len(memory) // 8)]],
    }


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def transactions_with_streams(key: str, count: int, url: str) -> float:
    """Transactions of the database per second while this many event streams are open."""
    headers = {"Authorization": f"Bearer {key}", "Accept": "text/event-stream"}
    limits = httpx.Limits(max_connections=count + 1)
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        async with contextlib.AsyncExitStack() as stack:
            client = await stack.enter_async_context(
                httpx.AsyncClient(headers=headers, limits=limits, timeout=60)
            )
            for _ in range(count):
                stream = client.stream("GET", f"http://127.0.0.1:{PORT}/v1/events")
                answer = await stack.enter_async_context(stream)
                answer.raise_for_status()
            await asyncio.sleep(3)  # PostgreSQL counts with a delay of a second
            before = connection.scalar(_TRANSACTIONS)
            await asyncio.sleep(STREAM_SECONDS)
            after = connection.scalar(_TRANSACTIONS)
    engine.dispose()
    return round(float(after - before) / STREAM_SECONDS, 1)


def page_ms(key: str) -> float:
    """The median time of a page of jobs, in milliseconds."""
    seconds = []
    with httpx.Client(headers={"Authorization": f"Bearer {key}"}) as client:
        for _ in range(50):
            begun = time.perf_counter()
            client.get(f"http://127.0.0.1:{PORT}/v1/jobs?status=succeeded&limit=20")
            seconds.append(time.perf_counter() - begun)
    return round(1000 * sorted(seconds)[len(seconds) // 2], 2)


def main() -> None:  # pylint: disable=too-many-locals
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--reads", type=float, default=200, help="per second")
    parser.add_argument("--creates", type=float, default=20, help="per second")
    parser.add_argument("--rows", type=int, default=100_000, help="finished jobs in the table")
    parser.add_argument("--streams", type=int, default=200, help="open event streams")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="api-load-"))
    with ExitStack() as parts:
        postgres = parts.enter_context(PostgresNode(durable=True))
        s3 = parts.enter_context(S3Server())
        s3.create_bucket(BUCKET)
        rabbitmq = parts.enter_context(RabbitMqNode(folder / "rabbitmq"))
        url = postgres.create_database("benchmark")
        pid, key = parts.enter_context(server(url, s3, rabbitmq, folder))
        engine = sqlalchemy.create_engine(url)
        few = _filled(engine, key, 1000)
        many = _filled(engine, key, arguments.rows)
        load_before = round(os.getloadavg()[0], 1)
        measured = asyncio.run(load(key, arguments, pid))
        streams = {
            f"transactions_per_second_with_{count}_streams": asyncio.run(
                transactions_with_streams(key, count, url)
            )
            for count in (0, arguments.streams)
        }
        engine.dispose()
    cores = len(os.sched_getaffinity(0))
    facts = {
        "cores": cores,
        "load_average_before": load_before,
        "load_average_at_end": round(os.getloadavg()[0], 1),
        "rows": arguments.rows,
        "page_ms_at_1000_rows": few,
        "page_ms_at_all_rows": many,
    }
    print(json.dumps(facts | measured | streams, indent=1))


def _filled(engine: sqlalchemy.Engine, key: str, rows: int) -> float:
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("DELETE FROM jobs"))
        connection.execute(sqlalchemy.text(_FILL), {"rows": rows})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sqlalchemy.text("VACUUM ANALYZE jobs"))
    return page_ms(key)


if __name__ == "__main__":
    main()
