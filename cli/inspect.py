"""`python main.py inspect FILE`: a summary of a LoRA file, every detail with `--all`, or JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from utils.wording import counted

if TYPE_CHECKING:
    from training.style.results.inspection import Inspection

_LONGEST_VALUE = 120
# Metadata that the summary shows, and its name there.
_OF_INTEREST = {
    "modelspec.title": "title",
    "modelspec.trigger_phrase": "trigger word",
    "modelspec.resolution": "resolution",
    "modelspec.date": "trained on",
    "modelspec.usage_hint": "use",
}


def run(
    path: Path, *, as_json: bool, show_all: bool = False, console: Console | None = None
) -> int:
    """Print what a file is.

    Args:
        path: The file.
        as_json: Print JSON with everything.
        show_all: Print every layer and the metadata, too.
        console: The console to print to; standard output by default.

    Returns:
        0; 1 if the file is not a LoRA that can be read.
    """
    # Imported late: it brings torch, which the front desk does without.
    # pylint: disable-next=import-outside-toplevel
    from training.style.results.inspection import NotALora, inspect

    try:
        found = inspect(path)
    except NotALora as refusal:
        Console(stderr=True).print(Text(_printable(str(refusal)), "red"), soft_wrap=True)
        return 1
    console = console or Console()
    if as_json:
        values = dataclasses.asdict(found) | {"about_alpha": found.about_alpha}
        print(json.dumps(values, indent=2, allow_nan=False), file=console.file)
        return 0
    _summary(found, console)
    if show_all:
        _layers(found, console)
        _metadata(found, console)
    else:
        entries = counted(len(found.metadata), "metadata entry", "metadata entries")
        console.print(
            f"--all also prints {counted(len(found.layers), 'layer')} and {entries}.",
            style="dim",
            highlight=False,
        )
    return 0


def _summary(found: Inspection, console: Console) -> None:
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    numbers = f"{found.parameters:,} numbers, {', '.join(found.dtypes)}"
    rows = [
        ("file", found.file),
        ("format", found.format),
        ("base", found.base or "unknown"),
        *(
            (name, found.metadata[key])
            for key, name in _OF_INTEREST.items()
            if key in found.metadata
        ),
        ("rank", ", ".join(map(str, found.ranks))),
        ("alpha", ", ".join(f"{alpha:g}" for alpha in found.alphas) or "not in the file"),
        ("layers", f"{len(found.layers)} ({numbers})"),
        ("targets", ", ".join(f"{count} × {name}" for name, count in found.targets.items())),
        ("read by", _readers(found)),
        ("‖ΔW‖", _spread(found.norms)),
    ]
    for name, value in rows:
        facts.add_row(name, Text(_printable(_shortened(value))))
    console.print(facts)
    for note in found.notes:
        console.print(Text(f"note: {note}", "yellow"))
    if found.about_alpha:
        console.print(Text(found.about_alpha))


def _layers(found: Inspection, console: Console) -> None:
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


def _metadata(found: Inspection, console: Console) -> None:
    metadata = Table("name", "value", title="Metadata", title_justify="left")
    for name, value in sorted(found.metadata.items()):
        metadata.add_row(
            Text(_printable(name)), Text(_printable(_shortened(value)), overflow="fold")
        )
    console.print(metadata)


def _shortened(value: str) -> str:
    return value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}…"


def _printable(text: str) -> str:
    """A stranger's text, fit for a terminal: no escape sequences."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _readers(found: Inspection) -> str:
    # Imported late, with the rest of the package.
    # pylint: disable-next=import-outside-toplevel
    from training.style.results.readers import in_words

    return in_words(found.readers, len(found.layers)) if found.readers else "not known"


def _spread(norms: tuple[float, float, float] | None) -> str:
    if not norms:
        return "–"
    least, mean, most = norms
    return f"{least:.4g} to {most:.4g}, mean {mean:.4g}"
