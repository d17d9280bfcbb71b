"""The arrows between packages, and the one importer of each foreign client."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.kinds import REGISTRY

ROOT = Path(__file__).parents[2]
ROOMS = (
    *("main", "config", "api", "cli", "consumer", "conversations", "images", "jobs", "local"),
    *("reports", "services", "training", "utils"),
)
BESIDE_IT = {"tests", "sandbox", "benchmarks", "tools"}
MOST_SIBLINGS = 15
MOST_TESTS = 30

# room -> the rooms that it may import. `main` composes everything.
ARROWS: dict[str, set[str]] = {
    "main": {"config", "cli", "consumer", "services", "utils"},
    "api": {"config", "conversations", "images", "jobs", "reports", "services", "utils"},
    "cli": {
        *("api", "config", "consumer", "conversations", "images", "jobs", "local"),
        "services",
        "training",
        "utils",
    },
    "local": {"utils"},
    "consumer": {"config", "jobs", "services", "utils"},
    "services": {"jobs", "utils"},
    "config": {"jobs", "utils"},
    "training": {"conversations", "images", "reports", "jobs", "utils"},
    "reports": {"jobs", "utils"},
    "images": {"utils"},
    "conversations": {"utils"},
    "jobs": {"utils"},
    "utils": set(),
}

# Rooms that serve every kind of job, and the commands that serve one kind only.
NEUTRAL = {"main", "config", "consumer", "services", "utils"}
COMMANDS_OF_A_KIND = (
    *("cli/training/*.py", "cli/inspect.py", "cli/up.py"),
    *("cli/commands.py", "cli/actions.py", "cli/doctor/base_model.py"),
    "cli/doctor/language_models.py",
    *("cli/jobs/order.py", "cli/jobs/styles.py", "cli/jobs/redrive.py"),
)
WORDS_OF_KINDS = {
    *("style", "styles", "epoch", "epochs", "lora", "unet", "caption", "captions", "prompt"),
    *("prompts", "picture", "pictures", "perplexity", "conversation", "conversations"),
    *REGISTRY,
}
# file -> the words that it has for another reason.
NAMED_ALL_THE_SAME = {
    # The checkpoint of every kind has an epoch, in records and in names.
    "consumer/life/checkpoint_uploads.py": {"epoch"},
    "utils/events.py": {"epoch", "epochs"},
    # Log events that dashboards may use.
    "consumer/life/inputs.py": {"caption", "picture", "pictures"},
    # Names of settings of earlier programs.
    "utils/settings/names.py": {"epochs", "llm", "lora"},
    # PEFT's word, for the adapters of both kinds.
    "training/runtime/quantisers.py": {"lora"},
    # The spelling of an address, and of a text on the terminal.
    "cli/doctor/command.py": {"styles"},
    "cli/doctor/storage.py": {"style"},
    "cli/jobs/screen.py": {"style"},
    "main.py": {"style"},
    # A field of the JSON output, for the scripts of the platform.
    "cli/jobs/job_view.py": {"style"},
    "cli/program.py": {"style"},
    "services/s3/client.py": {"style"},
    "services/s3/s3_service.py": {"style"},
    "utils/logger.py": {"style"},
    "utils/settings/groups.py": {"style"},
}

# They see all settings; every other module gets the values that it needs.
COMPOSITION_ROOTS = {
    *("api/app.py", "cli/api.py"),
    *("cli/doctor/command.py", "cli/server.py", "cli/training/local.py"),
    *("cli/training/style.py", "cli/training/language.py"),
    *("cli/up.py", "cli/worker.py", "consumer/worker.py"),
}

# A foreign client -> the one file that may import it, and that translates its errors. The two web
# servers, and each way of webhooks, have a file.
ONE_IMPORTER: dict[str, str | set[str]] = {
    "pika": "services/broker/client.py",
    "boto3": "services/s3/client.py",
    "botocore": "services/s3/client.py",
    "requests": "services/webhooks/exchange.py",
    "standardwebhooks": {
        "services/webhooks/customers.py",
        "services/webhooks/signing.py",
        "services/webhooks/webhook_service.py",
        "services/webhooks/verification.py",
    },
    "huggingface_hub": {
        "cli/doctor/base_model.py",
        "cli/doctor/language_models.py",
        "training/language/base.py",
    },
    "pynvml": "utils/gpu_monitor.py",
    "prometheus_client": "utils/metrics.py",
    "opentelemetry": "services/telemetry/tracing.py",
    "sentry_sdk": "services/telemetry/error_reports.py",
    "uvicorn": {"consumer/pages/http_pages.py", "api/serve.py"},
    "alembic": {"api/store/migrating.py", "api/store/migrations"},
    "python_multipart": "api/gate/intake.py",
    "dotenv": "config.py",
    "pydantic_settings": "config.py",
}
# Imported by Accelerate, if its setting is present.
BY_OTHERS = {"tensorboard"}
TYPES_ONLY = {"mypy_boto3_s3"}
# Imported under another name than its package's, which is installed and pinned.
PART_OF = {"botocore": "boto3", "pydantic_core": "pydantic", "urllib3": "requests"}
# One import name of several packages, of which these are used.
SHARED = {
    "opentelemetry": {
        "opentelemetry-api",
        "opentelemetry-sdk",
        "opentelemetry-exporter-otlp-proto-http",
    }
}
TORCH = {"torch", "diffusers", "transformers", "peft", "accelerate", "safetensors"}
OPTIMIZERS = {"prodigyopt", "bitsandbytes"}
NOT_IN_FRONT = {*TORCH, *OPTIMIZERS, "matplotlib", "tensorboard"}
# Used if it is installed.
OPTIONAL = {"bitsandbytes"}
# room -> the foreign packages that it may import. The image of a room needs no others.
PACKAGES: dict[str, set[str]] = {
    "main": {"typer"},
    "config": {"pydantic", "pydantic_settings"},
    "api": {
        "alembic",
        "fastapi",
        "jinja2",
        "markupsafe",
        "pydantic",
        "python_multipart",
        "sqlalchemy",
        "starlette",
        "uvicorn",
    },
    "cli": {"huggingface_hub", "rich", "structlog", "typer"},
    "consumer": {"starlette", "structlog", "uvicorn"},
    "services": {
        *("boto3", "botocore", "mypy_boto3_s3", "opentelemetry", "pika", "requests"),
        *("sentry_sdk", "standardwebhooks", "urllib3"),
    },
    "training": {*TORCH, *OPTIMIZERS, "PIL", "huggingface_hub", "jinja2", "matplotlib", "numpy"},
    "reports": {"PIL", "jinja2", "markupsafe", "numpy"},
    "images": {"PIL", "imagehash", "numpy"},
    "conversations": set(),
    "jobs": {"pydantic", "pydantic_core"},
    "local": set(),
    "utils": {"prometheus_client", "pydantic", "pynvml", "structlog"},
}
# Packages that a machine for training only does not have.
CLIENTS = (
    *("pika", "boto3", "botocore", "standardwebhooks", "pydantic_settings"),
    *("structlog", "rich", "pynvml", "matplotlib", "imagehash", "moto", "prometheus_client"),
    *OPTIMIZERS,
)


def product_files() -> list[Path]:
    """Every Python file of the product itself, relative to the root."""
    found = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    found += [ROOT / f"{room}.py" for room in ROOMS if (ROOT / f"{room}.py").exists()]
    return sorted(path.relative_to(ROOT) for path in found)


def all_files() -> list[Path]:
    """Every Python file of the repository."""
    ours = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    return sorted(path for path in ours if not path.parts[0].startswith((".", "build")))


def tree_of(path: Path) -> ast.Module:
    """The file's syntax."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def room_of(path: Path) -> str:
    """The room of a file: its top-level folder, or its name at the root."""
    return path.parts[0].removesuffix(".py")


def modules_of(node: ast.AST, path: Path) -> Iterator[str]:
    """The modules, dotted, that one import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = path.parts[: len(path.parts) - node.level] if node.level else ()
        yield ".".join((*package, *filter(None, (node.module,))))


def imports(path: Path) -> set[str]:
    """The top-level names of everything that a file imports, at any place."""
    nodes = ast.walk(tree_of(path))
    return {module.split(".")[0] for node in nodes for module in modules_of(node, path)}


def attributes(path: Path) -> set[str]:
    """`module.name` for each attribute of a plain name, and each `from module import name`."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def distributions(*files: str) -> set[str]:
    """The packages, by their normal names, that requirement files pin."""
    lines = (line for file in files for line in (ROOT / file).read_text("utf-8").splitlines())
    pinned = (re.match(r"([A-Za-z0-9._-]+)(\[.*\])?==", line) for line in lines)
    return {normal(match[1]) for match in pinned if match}


def normal(name: str) -> str:
    """A package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a separate Python, from the root."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


# ---- arrows --------------------------------------------------------------------------------------


def test_the_walk_finds_the_packages() -> None:
    assert {room_of(path) for path in product_files()} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_between_packages_run_one_way(room: str) -> None:
    wrong = {
        f"{path} imports {name}"
        for path in product_files()
        if room_of(path) == room
        for name in imports(path) & set(ROOMS) - ARROWS[room] - {room}
    }
    assert not wrong


def test_the_runtime_of_the_trainer_process_knows_no_kind() -> None:
    wrong = {
        f"{path} imports {module}"
        for path in product_files()
        if path.parts[:2] == ("training", "runtime")
        for node in ast.walk(tree_of(path))
        for module in modules_of(node, path)
        if f"{module}.".startswith("training.") and module.split(".")[1:2] != ["runtime"]
    }
    assert not wrong


def test_the_product_imports_no_test_no_sandbox_and_no_tool() -> None:
    wrong = {path for path in product_files() if imports(path) & BESIDE_IT}
    assert not wrong


def is_neutral(path: Path) -> bool:
    """Whether a file serves every kind of job, so that it may name no fact of one kind."""
    if room_of(path) == "cli":
        return not any(path.match(each) for each in COMMANDS_OF_A_KIND)
    return room_of(path) in NEUTRAL or path.parts[:2] == ("training", "runtime")


def test_neutral_rooms_import_no_kind() -> None:
    of_kinds = {f"jobs.{name}" for name in REGISTRY} | {"jobs.base_models", "jobs.epochs"}
    wrong = {
        f"{path} imports {module}"
        for path in filter(is_neutral, product_files())
        for node in ast.walk(tree_of(path))
        for module in modules_of(node, path)
        if module in of_kinds
    }
    assert not wrong


def words_in(line: str) -> set[str]:
    """The words of a line of code or prose, in lower case, those inside names included."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", line)}


def test_neutral_rooms_name_no_fact_of_a_kind() -> None:
    """A name that has to be here belongs to the interface of kinds (`jobs.kinds.JobKind`)."""
    found: dict[str, set[str]] = {}
    for path in filter(is_neutral, product_files()):
        words = words_in((ROOT / path).read_text("utf-8")) & WORDS_OF_KINDS
        if words:
            found[str(path)] = words
    assert found == NAMED_ALL_THE_SAME


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {".".join(path.with_suffix("").parts): path for path in product_files()}
    arrows: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        for node in ast.walk(tree_of(path)):
            for module in modules_of(node, path):
                parts = [f"{module}.{each.name}" for each in getattr(node, "names", ())]
                arrows[name] |= {*parts, module} & set(names) - {name}
    while leaves := {name for name, used in arrows.items() if not used}:
        arrows = {name: used - leaves for name, used in arrows.items() if name not in leaves}
    assert not arrows  # the rest is a circle, or imports one


def test_only_composition_roots_see_all_settings() -> None:
    importers = {str(path) for path in product_files() if "config" in imports(path)}
    assert importers == COMPOSITION_ROOTS


def _is_in(path: Path, places: set[str]) -> bool:
    return any(str(path) == place or place in map(str, path.parents) for place in places)


@pytest.mark.parametrize("client", ONE_IMPORTER)
def test_a_foreign_client_has_one_importer(client: str) -> None:
    allowed = ONE_IMPORTER[client]
    allowed = {allowed} if isinstance(allowed, str) else allowed
    importers = {path for path in product_files() if client in imports(path)}
    assert {str(each) for each in importers if not _is_in(each, allowed)} == set()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_its_packages(room: str) -> None:
    wrong = {
        f"{path} imports {name}"
        for path in product_files()
        if room_of(path) == room
        for name in imports(path) - PACKAGES[room] - {*ROOMS, *sys.stdlib_module_names}
    }
    assert not wrong


def test_the_environment_is_read_only_in_config_and_where_children_inherit_it() -> None:
    readers = {
        str(path)
        for path in product_files()
        if attributes(path) & {"os.environ", "os.environb", "os.getenv", "os.putenv"}
    }
    assert readers <= {"config.py", "local/processes.py"}


def test_the_beginning_of_an_s3_key_is_written_only_in_the_layout() -> None:
    beginnings = ("jobs/", "models/", "checkpoints/", "staging/", "archive/", "training/")
    found = {
        f"{path}:{node.lineno}: {node.value[:40]}"
        for path in product_files()
        if str(path) != "jobs/layout.py"
        for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith(beginnings)
    }
    assert not found


# ---- proofs by running ---------------------------------------------------------------------------


def test_training_imports_on_a_machine_without_any_client_library() -> None:
    modules = sorted(
        ".".join(path.with_suffix("").parts)
        for path in product_files()
        if room_of(path) == "training" and path.name != "__init__.py"
    )
    ran = python(f"""
import importlib, sys
from importlib.machinery import PathFinder

class WithoutClients(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {CLIENTS!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutClients
for module in {modules!r}:
    importlib.import_module(module)
print("imported", len({modules!r}))
""")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip().endswith(f"imported {len(modules)}")


def test_optional_packages_are_imported_only_if_they_are_used() -> None:
    ran = python("""
import sys
import main, consumer.worker
print(sorted({"opentelemetry.sdk", "sentry_sdk", "tensorboard", "torch"} & set(sys.modules)))
""")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"


def test_the_front_desk_does_not_import_torch() -> None:
    ran = python(f"""
import sys
import main, consumer.pipeline, consumer.training_consumer, consumer.trainer.trainer_process
print(sorted({TORCH!r} & set(sys.modules)))
""")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"


# ---- requirements --------------------------------------------------------------------------------


def required(*rooms: str) -> set[str]:
    """The distributions that rooms import."""
    packages = importlib.metadata.packages_distributions()
    foreign = {name for path in product_files() if room_of(path) in rooms for name in imports(path)}
    foreign -= {*ROOMS, *sys.stdlib_module_names, *TYPES_ONLY, *PART_OF, *OPTIONAL}
    wanted = {normal(packages[name][0]) for name in foreign - set(SHARED)}
    return wanted.union(*(SHARED[name] for name in foreign & set(SHARED)))


def test_the_requirements_are_what_the_product_imports_and_no_more() -> None:
    worker = set(ROOMS) - {"api"}
    files = ("requirements.txt", "requirements-front.txt")
    assert distributions(*files) == required(*worker) | BY_OTHERS
    front = distributions("requirements-front.txt")
    assert front == required(*worker - {"training"})
    assert not front & distributions("requirements.txt")


def test_an_image_without_the_training_packages_runs_the_commands_and_the_front_desk() -> None:
    ran = python(f"""
import sys
from importlib.machinery import PathFinder

class WithoutTraining(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = name.split(".")[0] in {NOT_IN_FRONT!r}
        return None if missing else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTraining
import main, cli.actions, cli.doctor.command, cli.worker, consumer.worker
import images.vetting, reports.html_report
""")
    assert ran.returncode == 0, ran.stderr


def test_the_requirements_of_the_api_are_what_it_imports() -> None:
    ran = python("""
import sys
import api.app, api.serve, main
print(sorted(sys.modules))
""")
    assert ran.returncode == 0, ran.stderr
    modules = set(ast.literal_eval(ran.stdout.strip().splitlines()[-1]))
    loaded = {name.partition(".")[0] for name in modules}
    packages = importlib.metadata.packages_distributions()
    files = [path for path in product_files() if ".".join(path.with_suffix("").parts) in modules]
    ours = {name for path in files for name in imports(path)}
    # FastAPI loads OpenTelemetry if it is installed.
    direct = {normal(packages[name][0]) for name in (ours - set(SHARED)) & loaded & set(packages)}
    of_the_api = distributions("requirements-api.txt")
    in_part = {normal(each) for each in PART_OF}
    assert direct - in_part <= of_the_api
    # SQLAlchemy loads the driver by the database's address; of fastapi-offline only files are used;
    # the decoder's perceptual hash is imported with the first image.
    by_name = {"psycopg", "fastapi-offline", "imagehash", *SHARED["opentelemetry"]}
    assert of_the_api - direct == by_name


def test_packages_in_two_requirement_files_have_one_version() -> None:
    def pins(file: str) -> dict[str, str]:
        lines = (ROOT / file).read_text("utf-8").splitlines()
        found = (re.match(r"([A-Za-z0-9._-]+)(?:\[.*\])?==(\S+)", line) for line in lines)
        return {normal(match[1]): match[2] for match in found if match}

    worker, api = pins("requirements.txt"), pins("requirements-api.txt")
    assert {name: api[name] for name in worker.keys() & api} == {
        name: worker[name] for name in worker.keys() & api
    }


def test_the_api_imports_no_worker_and_no_training() -> None:
    ran = python(f"""
import sys
import api.app, api.serve
print(sorted({{"consumer", "training", *{TORCH!r}}} & set(sys.modules)))
""")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"


def test_every_installed_package_is_locked() -> None:
    installed = {normal(each.metadata["Name"]) for each in importlib.metadata.distributions()}
    locked = distributions(*(f"requirements{part}.lock" for part in ("", "-cuda", "-dev")))
    assert installed - locked <= {"pip"}


# ---- habits --------------------------------------------------------------------------------------


def test_nothing_is_pickled() -> None:
    pickles = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    calls = {"torch.load", "torch.save", "numpy.load", "np.load"}
    wrong = {
        path
        for path in (*product_files(), *(p for p in all_files() if room_of(p) == "sandbox"))
        if imports(path) & pickles or attributes(path) & calls
    }
    assert not wrong


def test_no_error_is_caught_without_naming_its_class() -> None:
    wrong = {
        f"{path}:{node.lineno}"
        for path in all_files()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    }
    assert not wrong


def test_a_public_class_name_stands_once_in_the_product() -> None:
    places: dict[str, list[str]] = {}
    for path in product_files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(f"{path}:{node.lineno}")
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_no_folder_has_more_than_fifteen_siblings() -> None:
    folders = {path.parent for path in product_files() if len(path.parts) > 1}
    sizes = {
        str(folder): len([one for one in (ROOT / folder).iterdir() if one.name != "__pycache__"])
        for folder in folders
    }
    assert not {folder: size for folder, size in sizes.items() if size > MOST_SIBLINGS}


def test_no_folder_of_tests_has_more_than_thirty_siblings() -> None:
    folders = {path.parent for path in all_files() if path.parts[0] == "tests"}
    sizes = {
        str(folder): len([one for one in (ROOT / folder).iterdir() if one.name != "__pycache__"])
        for folder in folders - {Path("tests/chaos")}  # one suite, whose parts belong together
    }
    assert not {folder: size for folder, size in sizes.items() if size > MOST_TESTS}


def test_no_file_is_named_helpers_or_misc() -> None:
    assert not [path for path in all_files() if path.name in ("helpers.py", "misc.py")]


def test_every_folder_of_tests_is_a_package() -> None:
    folders = {path.parent for path in all_files() if path.name.startswith("test_")}
    assert not {folder for folder in folders if not (ROOT / folder / "__init__.py").exists()}
