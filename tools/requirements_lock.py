"""`scripts/lock`: resolve the requirement files with uv and write the lock files.

A lock lists every package at one version, dependencies included, with the SHA-256 of each file
that the index offers for it. Locks are for CPython 3.11 on Linux (x86-64 and arm64). pip and uv
install them with `--require-hashes --no-deps`.

Both builds of torch are accepted: the index's, which uses CUDA, and the build for CPUs, which
PyTorch publishes on its own index. The latter has a separate lock, so that it can be chosen, and
so have the CUDA libraries, because it needs none of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRODUCT, TESTS, BUILD = "requirements", "requirements-dev", "requirements-build"
ROOMS = ("requirements-front",)
"""Parts of the product that have their own lock; their packages are in the product's lock too."""
API, S3, LLM = "requirements-api", "requirements-s3", "requirements-llm"
CPU, CUDA = "requirements-cpu", "requirements-cuda"
CUDA_LIBRARIES = re.compile(r"(nvidia-(?!ml-py$)|cuda-|triton$)")
"""Packages that only torch's CUDA build depends on."""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_UV = (sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal")
_ENVIRONMENT = (
    "[tool.uv]\nenvironments = [\"sys_platform == 'linux' and python_version == '3.11'\"]\n"
)


@dataclasses.dataclass(frozen=True)
class Package:
    """One locked package.

    Attributes:
        pin: Name and version, `name==version`.
        hashes: SHA-256 in hexadecimal, of every file of that version.
    """

    pin: str
    hashes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The package's name, as PyPI compares names."""
        return self.pin.partition("==")[0]


def parse(text: str) -> list[Package]:
    """The packages of a lock file, or of uv's output."""
    found = re.findall(r"^(\S+==[^\s;]+)[^\\\n]*((?:\\\n[^\\\n]*)*)", text, re.MULTILINE)
    return [Package(pin, tuple(re.findall("sha256:([0-9a-f]{64})", rest))) for pin, rest in found]


def render(packages: Iterable[Package], *head: str) -> str:
    """The text of a lock file."""
    lines = [f"# {line}" if not line.startswith("#") else line for line in head]
    for package in packages:
        hashes = [f"    --hash=sha256:{each}" for each in sorted(set(package.hashes))]
        lines.append(" \\\n".join([package.pin, *hashes]))
    return "\n".join(lines) + "\n"


def resolve(source: str, preferred: str) -> list[Package]:
    """All packages that a requirement file needs.

    Args:
        source: Name of the requirement file, without its ending.
        preferred: A lock whose versions are kept where they still fit.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pyproject.toml").write_text(_ENVIRONMENT, encoding="utf-8")
        output = Path(folder) / "lock.txt"
        output.write_text(preferred, encoding="utf-8")
        options = ("--python-version", "3.11", "--generate-hashes", "--only-binary", ":all:")
        quiet = ("--no-header", "--no-annotate")
        command = (*_UV, *options, *quiet, "-o", output, ROOT / f"{source}.txt")
        subprocess.run(command, cwd=folder, check=True)
        return parse(output.read_text(encoding="utf-8"))


def hashes_on_page(page: str, version: str) -> tuple[str, ...]:
    """Hashes of torch's wheels for CPUs, Linux and CPython 3.11, as a simple index lists them.

    Args:
        page: HTML of the index page.
        version: torch's version, without a local part.
    """
    wheel = rf"torch-{re.escape(version)}(?:\+|%2B)cpu-cp311-cp311-\w*linux\w*\.whl"
    found = re.findall(rf"{wheel}#sha256=([0-9a-f]{{64}})", html.unescape(page), re.IGNORECASE)
    return tuple(sorted(set(found)))


def cpu_hashes(version: str, known: Iterable[str]) -> tuple[str, ...]:
    """Hashes of torch's wheels for CPUs.

    PyTorch's own index is asked first, then the indexes that pip is configured for.

    Args:
        version: torch's version, without a local part.
        known: The hashes in the present lock, kept if PyTorch's index cannot be reached.
    """
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=60) as answer:
            if listed := hashes_on_page(answer.read().decode(), version):
                return listed
    except OSError as error:
        print(f"{CPU_INDEX} cannot be reached ({error})", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        options = ("--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder)
        command = (sys.executable, "-m", "pip", "download", *options, f"torch=={version}+cpu")
        subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
        wheels = sorted(Path(folder).glob("torch-*.whl"))
        found = [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels]
    return tuple(sorted({*known, *found}))


def main() -> None:
    """Write every lock file."""
    old = {name: _read(name) for name in (PRODUCT, TESTS, CUDA, CPU, LLM, BUILD, API, S3)}
    everything = resolve(TESTS, "\n".join(old[name] for name in (PRODUCT, TESTS, CUDA)))
    product = resolve(PRODUCT, render(everything))
    torch = next(package for package in product if package.name == "torch")
    cpu_pin = f"{torch.pin}+cpu"
    known = [sha for package in parse(old[CPU]) if package.pin == cpu_pin for sha in package.hashes]
    for_cpus = cpu_hashes(torch.pin.partition("==")[2], known)
    if not for_cpus:
        print("torch's build for CPUs was not found; the lock lists only CUDA's", file=sys.stderr)
    product = [
        dataclasses.replace(each, hashes=(*each.hashes, *for_cpus)) if each == torch else each
        for each in product
    ]
    pins = {package.pin for package in product}
    made = {
        PRODUCT: [each for each in product if not CUDA_LIBRARIES.match(each.name)],
        CUDA: [each for each in product if CUDA_LIBRARIES.match(each.name)],
        CPU: [Package(cpu_pin, for_cpus)] if for_cpus else [],
        LLM: [each for each in resolve(LLM, render(everything)) if each.pin not in pins],
        TESTS: [each for each in everything if each.pin not in pins],
        BUILD: resolve(BUILD, old[BUILD]),
        API: resolve(API, render(everything)),
        S3: resolve(S3, old[S3]),
    }
    made |= {room: _part(room, product) for room in ROOMS}
    also = {
        PRODUCT: [],
        CUDA: ["The libraries of torch's CUDA build; its build for CPUs needs none of them."],
        CPU: ["torch's build for CPUs, in place of the one in requirements.lock."],
        LLM: ["The packages that the kind llm needs in addition to requirements.lock."],
        TESTS: ["The packages that the tests need in addition to requirements.lock."],
        BUILD: [],
        S3: ["The S3 server of `main.py up`, for a separate environment."],
        API: ["All packages of the API server, for its image; requirements-dev.lock has them too."],
    } | {room: [f"The part of requirements.lock that {room}.txt needs."] for room in ROOMS}
    for name, packages in made.items():
        head = "Made by scripts/lock, for CPython 3.11 on Linux. Do not edit."
        text = render(packages, head, *also[name])
        (ROOT / f"{name}.lock").write_text(text, encoding="utf-8")
        print(f"{name}.lock: {len(packages)} packages")


def _part(room: str, product: list[Package]) -> list[Package]:
    """The packages of one room, as the product has them."""
    names = {package.name for package in resolve(room, render(product))}
    return [package for package in product if package.name in names]


def _read(name: str) -> str:
    path = ROOT / f"{name}.lock"
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    main()
