"""`python main.py inspect FILE`: what a LoRA file is, as a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from training.inspection import Inspection

_LONGEST_VALUE = 120


def run(path: Path, *, as_json: bool) -> int:
    """Print what a file is; the exit code: 1 where it is no LoRA that can be read."""
    # Imported late: it brings torch, which the front desk does without.
    from training.inspection import NotALora, inspect  # pylint: disable=import-outside-toplevel

    try:
        found = inspect(path)
    except NotALora as refusal:
        Console(stderr=True).print(Text(_printable(str(refusal)), "red"), soft_wrap=True)
        return 1
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2, allow_nan=False))
    else:
        _show(found, Console())
    return 0


def _show(found: Inspection, console: Console) -> None:
    facts = Table(show_header=False, box=None)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in (
        ("file", found.file),
        ("format", found.format),
        ("base", found.base or "unknown"),
        ("rank", ", ".join(map(str, found.ranks))),
        ("alpha", ", ".join(f"{alpha:g}" for alpha in found.alphas) or "not said"),
        (
            "layers",
            f"{len(found.layers)} ({found.parameters:,} numbers, {', '.join(found.dtypes)})",
        ),
        ("targets", ", ".join(f"{count} × {name}" for name, count in found.targets.items())),
        ("‖ΔW‖", _spread(found.norms)),
    ):
        facts.add_row(name, Text(_printable(value)))
    console.print(facts)
    layers = Table("layer", title="Layers", title_justify="left")
    for title in ("rank", "alpha", "‖ΔW‖", "‖down‖", "‖up‖"):
        layers.add_column(title, justify="right", no_wrap=True)
    for layer in found.layers:
        norms = (layer.norm, layer.down_norm, layer.up_norm)
        layers.add_row(
            Text(_printable(layer.name), overflow="fold"),
            str(layer.rank),
            "–" if layer.alpha is None else f"{layer.alpha:g}",
            *("not finite" if norm is None else f"{norm:.4g}" for norm in norms),
        )
    console.print(layers)
    metadata = Table("name", "value", title="Metadata", title_justify="left")
    for name, value in sorted(found.metadata.items()):
        shown = value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}…"
        metadata.add_row(Text(_printable(name)), Text(_printable(shown), overflow="fold"))
    console.print(metadata)
    for note in found.notes:
        console.print(Text(f"note: {note}", "yellow"))


def _printable(text: str) -> str:
    """A stranger's text, fit for a terminal: no escape sequences."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _spread(norms: tuple[float, float, float] | None) -> str:
    if not norms:
        return "–"
    least, mean, most = norms
    return f"{least:.4g} to {most:.4g}, mean {mean:.4g}"
