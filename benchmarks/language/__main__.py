"""`python -m benchmarks.language`: tokens per second and memory, compared with plain TRL.

Both train the same LoRA on the same rows of a Llama of random weights, in legs that alternate, each
in a separate process. The median of the legs counts; the first step of a leg does not.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sandbox import stand_in_language_model as stand_in

LOOPS = ("ours", "trl")
console = Console()


def main(  # pylint: disable=too-many-locals  # one for each option
    output: Annotated[Path, typer.Option(help="File that receives the figures.")] = Path(
        "build/benchmarks/language.json"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Legs of each loop.")] = 5,
    steps: Annotated[int, typer.Option(min=4, help="Optimizer steps per leg.")] = 20,
    hidden: Annotated[int, typer.Option(help="Width of the Llama.")] = 256,
    layers: Annotated[int, typer.Option(help="Layers of the Llama.")] = 4,
) -> None:
    """Measure, print a table, and write it as JSON."""
    found: dict[str, list[dict[str, Any]]] = {loop: [] for loop in LOOPS}
    with tempfile.TemporaryDirectory() as folder:
        base = stand_in.build(Path(folder) / "base", hidden=hidden, layers=layers, vocabulary=4096)
        data = stand_in.write_conversations(Path(folder) / "data.jsonl", 200)
        for _ in range(repeats):
            for loop in LOOPS:
                command = [sys.executable, "-W", "ignore", "-m", "benchmarks.language.leg"]
                leg = [loop, str(base), str(data), str(steps)]
                ran = subprocess.run([*command, *leg], capture_output=True, text=True, check=False)
                if ran.returncode:
                    console.print(f"{loop}: not measured ({ran.stderr.strip()[-300:]})")
                    continue
                found[loop].append(json.loads(ran.stdout.splitlines()[-1]))
    medians = {
        loop: {
            name: statistics.median(leg[name] for leg in legs)
            for name in ("tokens_per_second", "peak_bytes")
        }
        for loop, legs in found.items()
        if legs
    }
    table = Table("loop", "tokens/s", "peak memory (MiB)")
    for loop, each in medians.items():
        memory = f"{each['peak_bytes'] / 1024**2:.0f}"
        table.add_row(loop, f"{each['tokens_per_second']:.0f}", memory)
    console.print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    content = {"medians": medians, "legs": found, "hidden": hidden, "layers": layers}
    output.write_text(json.dumps(content, indent=2), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
