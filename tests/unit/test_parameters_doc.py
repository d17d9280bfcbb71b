"""docs/parameters.md has every hyper-parameter as the source has it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jobs.llm import LlmParameters
from jobs.style import HyperParameters

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "parameters.md"


def test_every_hyper_parameter_has_its_row() -> None:
    rows = [line for line in DOCUMENT.read_text("utf-8").splitlines() if line.startswith("| `")]
    assert rows == [
        _row(field, kind)
        for kind, parameters in (("style", HyperParameters), ("llm", LlmParameters))
        for field in dataclasses.fields(parameters)
    ]


def _row(field: dataclasses.Field[Any], kind: str) -> str:
    limits = field.metadata
    if limits["choices"]:
        allowed = ", ".join(f"`{choice}`" for choice in limits["choices"])
    elif isinstance(field.default, bool):
        allowed = "true, false"
    elif isinstance(field.default, str):
        allowed = "text"
    else:
        allowed = f"{limits['low']:g} – {limits['high']:.10g}"
        allowed += ", `auto`" if limits["auto"] is not None else ""
    default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
    setting = f"{kind}_{limits['setting'] or field.name}"
    return (
        f"| `{field.name}` | {default.lower() if isinstance(field.default, bool) else default} | "
        f"{allowed} | `{setting.upper()}` | {limits['doc']} |"
    )
