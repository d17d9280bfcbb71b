"""What the pages for people name is there: files that are linked to, scripts, commands."""

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
def test_what_is_linked_to_is_there(name: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[name])
    missing = [link for link in links if not (ROOT / name).parent.joinpath(link).exists()]
    assert not missing


@pytest.mark.parametrize("name", TEXTS)
def test_the_files_of_scripts_and_deploy_that_are_named_are_there(name: str) -> None:
    named = re.findall(r"(?<![\w/])(?:scripts|deploy)/[\w./-]*\w", TEXTS[name])
    made = {"deploy/compose.env"}  # by whoever follows the page
    assert not [path for path in named if path not in made and not (ROOT / path).exists()]


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_that_is_named_is_the_programs(name: str) -> None:
    known = set(typer.main.get_group(main.app).commands)
    assert set(re.findall(r"main\.py ([a-z]+)\b", TEXTS[name])) <= known
