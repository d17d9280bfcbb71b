"""`scripts/sbom`: write a bill of materials (CycloneDX, JSON) of an image, from the lock files.

It lists the Python packages that the image installs, each with its version and the SHA-256 of the
files that are accepted. The same lock files give the same bytes. Packages of the base image are
not in it: scan the built image for these.
"""

from __future__ import annotations

import argparse
import json
import uuid
from pathlib import Path
from typing import Any

from tools.requirements_lock import ROOT, Package, parse

LOCKS = {
    "worker": ("requirements", "requirements-cuda"),
    "worker-llm": ("requirements", "requirements-cuda", "requirements-llm"),
    "commands": ("requirements-front",),
    "api": ("requirements-api",),
}
"""The lock files of each image target."""
_NAMESPACE = uuid.UUID("6f1f6a1e-3f0e-4c52-8f5e-0a9a5d1c7b11")


def packages_of(target: str, root: Path = ROOT) -> list[Package]:
    """The packages of an image, each once, by name."""
    texts = [(root / f"{name}.lock").read_text(encoding="utf-8") for name in LOCKS[target]]
    found = {package.name: package for text in texts for package in parse(text)}
    return [found[name] for name in sorted(found)]


def bill(target: str, packages: list[Package]) -> dict[str, Any]:
    """The bill of materials of an image."""
    components = [_component(package) for package in packages]
    content = json.dumps(components, sort_keys=True)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, target + content)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "container",
                "bom-ref": f"training-server-{target}",
                "name": f"training-server-{target}",
            }
        },
        "components": components,
        "dependencies": [
            {
                "ref": f"training-server-{target}",
                "dependsOn": [each["bom-ref"] for each in components],
            }
        ],
    }


def _component(package: Package) -> dict[str, Any]:
    name, _, version = package.pin.partition("==")
    address = f"pkg:pypi/{name}@{version}"
    hashes = [{"alg": "SHA-256", "content": each} for each in sorted(set(package.hashes))]
    return {
        "type": "library",
        "bom-ref": address,
        "name": name,
        "version": version,
        "purl": address,
        "externalReferences": [
            {
                "type": "distribution",
                "url": f"https://pypi.org/project/{name}/{version}/",
                "hashes": hashes,
            }
        ],
    }


def main() -> None:
    """Print the bill of the image that the command line names."""
    parser = argparse.ArgumentParser(
        prog="scripts/sbom", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("target", nargs="?", default="worker", choices=sorted(LOCKS))
    target = parser.parse_args().target
    print(json.dumps(bill(target, packages_of(target)), indent=2))


if __name__ == "__main__":
    main()
