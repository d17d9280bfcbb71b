"""The bill of materials has exactly the packages that an image installs."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tools.sbom import LOCKS, bill, packages_of

ROOT = Path(__file__).parents[3]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def stage(name: str) -> str:
    """The lines of a stage of the Dockerfile."""
    return DOCKERFILE.partition(f" AS {name}\n")[2].partition("\nFROM ")[0]


@pytest.mark.parametrize(
    ("target", "stages"),
    [
        ("worker", ("build",)),
        ("worker-llm", ("build", "build-llm")),
        ("commands", ("build-front",)),
        ("api", ("build-api",)),
    ],
)
def test_the_lock_files_are_those_that_the_image_installs(
    target: str, stages: tuple[str, ...]
) -> None:
    installed = {
        name
        for each in stages
        for name in re.findall(r"--requirements /build/([\w-]+)\.lock", stage(each))
    }
    assert installed == set(LOCKS[target])


@pytest.mark.parametrize("target", LOCKS)
def test_every_package_is_listed_once_with_its_version_and_hashes(target: str) -> None:
    packages = packages_of(target)
    made = bill(target, packages)
    addresses = [each["purl"] for each in made["components"]]
    assert len(addresses) == len(set(addresses)) == len(packages)
    assert made["dependencies"][0]["dependsOn"] == addresses
    for each in made["components"]:
        assert each["purl"] == f"pkg:pypi/{each['name']}@{each['version']}"
        (source,) = each["externalReferences"]
        assert source["hashes"]
        assert all(re.fullmatch("[0-9a-f]{64}", one["content"]) for one in source["hashes"])


def test_the_image_of_the_api_has_no_torch_and_that_of_the_worker_has() -> None:
    names = {target: {each.name for each in packages_of(target)} for target in LOCKS}
    assert "torch" in names["worker"] and "torch" not in names["api"] | names["commands"]


def test_the_script_prints_the_same_bytes_each_time() -> None:
    first, second = (
        subprocess.run(
            [ROOT / "scripts" / "sbom", "api"], capture_output=True, check=True, text=True
        ).stdout
        for _ in range(2)
    )
    assert first == second
    assert json.loads(first)["bomFormat"] == "CycloneDX"
