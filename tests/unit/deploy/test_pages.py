"""Files, scripts and commands that the documents name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

import main

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "deploy" / "runpod.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}


@pytest.mark.parametrize("name", TEXTS)
def test_every_linked_file_exists(name: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[name])
    missing = [link for link in links if not (ROOT / name).parent.joinpath(link).exists()]
    assert not missing


@pytest.mark.parametrize("name", TEXTS)
def test_every_named_file_of_scripts_and_deploy_exists(name: str) -> None:
    named = re.findall(r"(?<![\w/])(?:scripts|deploy)/[\w./-]*\w", TEXTS[name])
    made = {"deploy/compose.env"}  # the reader creates it
    assert not [path for path in named if path not in made and not (ROOT / path).exists()]


@pytest.mark.parametrize("name", TEXTS)
def test_every_named_command_exists(name: str) -> None:
    known = set(typer.main.get_group(main.app).commands)
    assert set(re.findall(r"main\.py ([a-z]+)\b", TEXTS[name])) <= known
