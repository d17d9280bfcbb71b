"""Every installation gets the same packages, and only files whose hashes are locked."""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.requirements_lock import Package, hashes_on_page, parse, render

ROOT = Path(__file__).parents[3]
LOCKS = sorted(path.name for path in ROOT.glob("requirements*.lock"))
SHA = "0123456789abcdef" * 4


def _locked(*names: str) -> dict[str, Package]:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in names]
    return {package.name: package for text in texts for package in parse(text)}


@pytest.mark.parametrize(
    "requirements",
    ["requirements", "requirements-front", "requirements-dev", "requirements-build"],
)
def test_the_locks_have_the_versions_that_the_requirement_files_ask_for(requirements: str) -> None:
    lines = (ROOT / f"{requirements}.txt").read_text(encoding="utf-8").splitlines()
    asked = [Requirement(line) for line in lines if re.match(r"\w", line)]
    locked = _locked(f"{requirements}.lock")
    if requirements == "requirements-dev":  # in addition to the product's
        locked |= _locked("requirements.lock")
    assert asked
    for each in asked:
        assert locked[canonicalize_name(each.name)].pin.endswith(str(each.specifier))


def test_the_lock_of_a_room_is_a_part_of_the_product_s_and_is_complete() -> None:
    product, front = _locked("requirements.lock"), _locked("requirements-front.lock")
    assert all(product[name] == package for name, package in front.items())
    assert not {"torch", "diffusers", "transformers", "matplotlib"} & set(front)
    environment: dict[str, str | AbstractSet[str]] = {"extra": ""}
    environment.update((name, str(value)) for name, value in default_environment().items())
    for each in distributions():
        if canonicalize_name(each.metadata["Name"]) in front:
            needed = [Requirement(text) for text in each.requires or ()]
            for one in needed:
                if one.marker is None or one.marker.evaluate(environment):
                    assert canonicalize_name(one.name) in front, (each.metadata["Name"], one)


def test_a_dependency_of_an_installed_package_is_locked_in_a_version_that_fits() -> None:
    locked = _locked("requirements.lock", "requirements-dev.lock", "requirements-cuda.lock")
    environment: dict[str, str | AbstractSet[str]] = {"extra": ""}
    environment.update((name, str(value)) for name, value in default_environment().items())
    for installed in distributions():
        for text in installed.requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate(environment):
                version = locked[canonicalize_name(needed.name)].pin.partition("==")[2]
                assert needed.specifier.contains(version, prereleases=True), (installed.name, text)


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_hashes_and_comes_from_an_index(lock: str) -> None:
    text = (ROOT / lock).read_text(encoding="utf-8")
    packages = parse(text)
    assert packages and all(package.hashes for package in packages)
    # No URL, no folder, no option: a package comes from the index that pip is configured for.
    assert render(packages) == re.sub("^#.*\n", "", text, flags=re.MULTILINE)


def test_torch_is_accepted_as_its_cuda_build_and_as_its_build_for_cpus() -> None:
    both = _locked("requirements.lock")["torch"]
    for_cpus = _locked("requirements-cpu.lock")["torch"]
    assert for_cpus.pin == f"{both.pin}+cpu"
    assert set(for_cpus.hashes) < set(both.hashes)


def test_the_cuda_libraries_are_locked_apart_from_what_a_machine_without_gpu_installs() -> None:
    cuda = _locked("requirements-cuda.lock")
    assert {"nvidia-cublas", "nvidia-cudnn-cu13", "triton"} <= set(cuda)
    assert not set(cuda) & set(_locked("requirements.lock", "requirements-dev.lock"))


@pytest.mark.parametrize("path", ["scripts/setup", "Dockerfile"])
def test_nothing_is_installed_without_a_hash(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8").replace("\\\n", " ")
    installs = [line for line in text.splitlines() if re.search(r"\bpip install\b", line)]
    options = re.search(r"options=\((.+)\)", text)
    assert installs
    for line in installs:
        meant = line.replace('"${options[@]}"', options[1] if options else "")
        assert {"--require-hashes", "--no-deps", "--only-binary"} <= set(meant.split()), line
        assert re.search(r"requirements[\w-]*\.lock", line)


def test_a_lock_is_read_from_the_resolver_without_its_markers() -> None:
    text = f"""\
cffi==2.1.1 ; python_full_version < '3.12' and sys_platform == 'linux' \\
    --hash=sha256:{SHA} \\
    --hash=sha256:{SHA[::-1]}
six==1.17.0 \\
    --hash=sha256:{SHA}
"""
    packages = parse(text)
    assert packages == [Package("cffi==2.1.1", (SHA, SHA[::-1])), Package("six==1.17.0", (SHA,))]
    assert parse(render(packages)) == packages


def test_only_the_linux_wheels_for_cpus_of_the_wanted_version_are_read_from_pytorchs_index() -> (
    None
):
    page = "\n".join(
        f'<a href="/whl/cpu/{name}#sha256={sha * 64}" data-core-metadata="x">{name}</a>'
        for name, sha in (
            ("torch-2.13.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl", "a"),
            ("torch-2.13.0%2Bcpu-cp311-cp311-manylinux_2_28_aarch64.whl", "b"),
            ("torch-2.13.0%2Bcpu-cp311-cp311-win_amd64.whl", "c"),
            ("torch-2.13.0%2Bcpu-cp312-cp312-manylinux_2_28_x86_64.whl", "d"),
            ("torch-2.13.1%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl", "e"),
        )
    )
    assert hashes_on_page(page, "2.13.0") == ("a" * 64, "b" * 64)
