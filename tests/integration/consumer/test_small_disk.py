"""A disk that is too small: the job is refused before the download, or ends as the machine's fault.

The small disks are real file systems in memory, mounted where only the test's process sees them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from consumer.life.inputs import download, object_sizes
from jobs.addresses import S3Location
from jobs.kinds import Input
from sandbox.photographs import photographs
from sandbox.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server
from services.s3.s3_service import S3Service
from training.style.stand_in_model import build_stand_in

ROOT = Path(__file__).resolve().parents[3]
OWN_MOUNTS = (
    *("unshare", "--mount", "--propagation", "private"),
    *(() if os.geteuid() == 0 else ("--user", "--map-root-user")),
)

MEASURE = """
import json, subprocess, sys
from pathlib import Path
from consumer.life.job_size import require_room
from consumer.life.stop_signal import StopSignal
from services.s3.s3_service import S3Service
from tests.unit.jobs.message_samples import envelope, make_settings, read, style_kind
from utils.errors import TrainingServerError
endpoint, bucket, folder, keys = sys.argv[1:3] + [Path(sys.argv[3])] + [sys.argv[4:]]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512M", "small", folder], check=True)
s3 = S3Service(region="REGION", endpoint_url=endpoint, access_key_id="ID", secret_access_key="KEY")
settings = make_settings(image_buckets=bucket, state_bucket_name=bucket)
job = read(envelope(images=[f"s3://{bucket}/{key}" for key in keys]), settings=settings)
for filler in (0, 300):
    (folder / "filler").write_bytes(bytes(filler * 1024**2))
    try:
        size = require_room(
            s3, s3, style_kind(settings), job, folder, StopSignal(),
            state_bucket=bucket, max_job_bytes=settings.limits.max_job_bytes,
        )
        print(json.dumps(["fits", size.images]))
    except TrainingServerError as error:
        print(json.dumps([type(error).__name__, str(error)]))
print(json.dumps(["files", [path.name for path in folder.iterdir()]]))
"""


def test_a_job_without_room_is_refused_by_the_disk_s_real_size_before_anything_is_downloaded(
    s3: S3Service, bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    keys = ("a.jpg", "b.jpg", "한글 é.jpg")
    for key in keys:
        s3.write(S3Location(bucket, key), b"x" * 1000)
    lines = in_own_mounts(
        MEASURE.replace("REGION", REGION)
        .replace("ID", ACCESS_KEY_ID, 1)
        .replace("KEY", SECRET_ACCESS_KEY, 1),
        *(s3_server.endpoint, bucket, str(tmp_path), *keys, "missing.jpg"),
    )
    assert lines[0] == ["fits", 3000]
    kind, sentence = lines[1]
    assert kind == "NoRoomForJob"
    assert "needs 402 MiB of disk space (2.93 KiB for its input files)" in sentence
    assert "212 MiB are free" in sentence
    assert lines[2] == ["files", ["filler"]]


def test_sizes_are_in_the_order_of_the_requests_and_an_unavailable_object_has_none(
    s3: S3Service, bucket: str
) -> None:
    for number in range(20):
        s3.write(S3Location(bucket, f"{number}.jpg"), b"x" * number)
    wanted = [S3Location(bucket, f"{number}.jpg") for number in range(25)]
    sizes = object_sizes(
        s3,
        [(each, None) for each in (*wanted, S3Location("no-such-bucket", "a"))],
        stop=lambda: False,
    )
    assert sizes == (*range(20), 0, 0, 0, 0, 0, 0)


def test_an_image_that_grew_after_it_was_measured_is_still_left_out(
    s3: S3Service, bucket: str, tmp_path: Path
) -> None:
    place = S3Location(bucket, "a.jpg")
    s3.write(place, b"x" * 10)
    assert object_sizes(s3, [(place, None)], stop=lambda: False) == (10,)
    s3.write(place, b"x" * 5000)
    request = Input(place.uri(), place)
    (fetched,) = download(s3, [request], tmp_path, max_bytes=4096, stop=lambda: False)
    assert fetched.path is None and "too large" in (fetched.problem or "")


TRAIN = """
import json, subprocess, sys
from pathlib import Path
from config import load_local
from consumer.life.stop_signal import StopSignal
from consumer.trainer.trainer_process import TrainerProcess
from jobs.kinds import Run
from jobs.kinds import TrainerOptions
from jobs.style import HyperParameters, StyleKind, TrainingImage, TrainingRun
from utils.errors import TrainingServerError
model, images, place = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
settings = load_local(_env_file=None)
trainer = TrainerProcess(
    TrainerOptions(model, allow_cpu=True, log_level="WARNING"),
    settings.trainer_environment(),
    stall_seconds=60,
    confinement=settings.trainer_confinement(place),
)

def train(name, size=None):
    folder = place / name
    folder.mkdir()
    if size:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "small", folder], check=True)
    run = TrainingRun(
        task_id=name, style_id=1, claim=1,
        images=tuple(TrainingImage(path.name, str(path), "") for path in sorted(images.iterdir())),
        parameters=HyperParameters(epochs=1, resolution=64, rank=64, batch_size=4),
        work_folder=str(folder), checkpoint_interval=1,
    )
    try:
        sent = Run.of(run, StyleKind.runner, {})
        trainer.run(sent, lambda event: None, StopSignal(), max_seconds=120)
        print(json.dumps([name, "done", ""]))
    except TrainingServerError as error:
        print(json.dumps([name, type(error).__name__, str(error)]))
    print(json.dumps(sorted(path.name for path in folder.glob("checkpoints/*"))), flush=True)
    return folder

def size_of(paths):
    return sum(path.stat().st_size for path in paths if path.is_file())

whole = train("whole")
checkpoint = size_of(whole.glob("checkpoints/*/*"))
train("no-room-for-a-checkpoint", checkpoint // 2)
train("no-room-for-the-model", checkpoint + size_of(whole.glob("output/*.safetensors")) // 2)
train("whole-again")
trainer.close()
"""


def test_a_disk_that_fills_up_in_mid_write_is_the_machine_s_fault_at_a_checkpoint_and_at_the_export(
    tmp_path: Path,
) -> None:
    model = build_stand_in(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "place").mkdir()
    for photograph in photographs()[:3]:
        (tmp_path / "pictures" / photograph.name).write_bytes(photograph.content)
    lines = in_own_mounts(TRAIN, str(model), str(tmp_path / "pictures"), str(tmp_path / "place"))
    ends, left = lines[::2], lines[1::2]
    full = "The worker's disk is full."
    assert ends == [
        ["whole", "done", ""],
        ["no-room-for-a-checkpoint", "DiskFull", full],
        ["no-room-for-the-model", "DiskFull", full],
        ["whole-again", "done", ""],
    ]
    assert left == [["epoch-0001"], [], ["epoch-0001"], ["epoch-0001"]]


def in_own_mounts(program: str, *arguments: str) -> list[list[str]]:
    """Run a program with its own mounted file systems; returns its lines of JSON."""
    quiet = "from utils import logger\nlogger.configure()\n"  # the log is not for standard output
    ran = subprocess.run(
        [*OWN_MOUNTS, sys.executable, "-c", quiet + program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )
    if ran.returncode:
        pytest.fail(ran.stderr)
    return [json.loads(line) for line in ran.stdout.splitlines()]
