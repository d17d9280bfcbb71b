"""`python -m benchmarks`: how fast training is here, side by side with a plain loop.

On a GPU with SD1.5 in full size, its weights random (speed does not depend on them), 512 pixels,
fp16. On a CPU with the same layout an eighth as wide, 64 pixels, on one thread, by the time that
the process computes; there only the ratio means anything. Legs of both loops alternate (ours,
plain, ours, …), so that what drifts falls on both; the first pair warms up and does not count.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import counts, images, loops, machine, sd15
from benchmarks.case import Case
from benchmarks.peers import Peer, PeerFailed
from jobs.kinds import TrainerOptions
from jobs.style import TrainingRun
from training.style.dataset import prepare
from training.style.examples import Dataset
from training.style.families.sd15 import BaseModel

console = Console()
FULL_SIDE, NARROW_SIDE = 512, 64


# One variable for each option.
def main(  # pylint: disable=too-many-locals
    output: Annotated[
        Path, typer.Option(help="Folder that receives benchmarks.json and benchmarks.png.")
    ] = Path("build/benchmarks"),
    peer_script: Annotated[
        list[Path] | None,
        typer.Option(help="diffusers' or kohya's script, from a checkout; may be repeated."),
    ] = None,
    peer_python: Annotated[
        Path | None, typer.Option(help="The interpreter to run these with; default: this one.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of legs that count.")] = 5,
    steps: Annotated[int, typer.Option(min=4, help="Optimizer steps a leg.")] = 60,
    batch_sizes: Annotated[str, typer.Option(help="On a GPU, separated by commas.")] = "1,4,8",
    quick: Annotated[bool, typer.Option(help="One small case, a pair of short legs.")] = False,
    goal_only: Annotated[
        bool,
        typer.Option(help="Only batch 1, checkpointing off, 10 images: the case of the goals."),
    ] = False,
    count: Annotated[
        bool, typer.Option(help="Count kernels, kept memory and FLOPs, too: two minutes.")
    ] = False,
) -> None:
    """Measure, print a table, write it as JSON and as a plot."""
    logging.getLogger("training").setLevel(logging.ERROR)
    on_gpu = torch.cuda.is_available()
    peers = [_peer(script, peer_python, on_gpu) for script in peer_script or ()]
    if quick:
        repeats, steps = 1, 8
    if not on_gpu:
        torch.set_num_threads(1)  # two would wait for each other, and the waiting would count
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as place:
        cases = _cases(on_gpu, batch_sizes, quick)
        if goal_only:
            cases = [case for case in cases if case.is_goal] or cases[:1]
        bench = _Bench(Path(place), on_gpu, max(case.images for case in cases), steps, repeats)
        gc.freeze()  # as in the trainer's process, for both loops
        results = with_lost_seconds([bench.measure(case) for case in cases])
        document = bench.facts | {"results": results, "peers": bench.ask(peers, cases)}
    document["counts"] = counts.count_all() if count else {}
    output.mkdir(parents=True, exist_ok=True)
    (output / "benchmarks.json").write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    _plot(document, output / "benchmarks.png")
    _show(document)
    if count:
        console.print(counts.table(document["counts"]))
    console.print(f"{output}/benchmarks.json and {output}/benchmarks.png have the whole of it.")


def _peer(script: Path, python: Path | None, on_gpu: bool) -> Peer:
    chosen = Path(sys.executable) if python is None else python
    if len(chosen.parts) > 1:  # the script runs in its own folder; a bare name is looked up
        chosen = chosen.absolute()
    try:
        return Peer(script.absolute(), str(chosen), on_cpu=not on_gpu)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--peer-script") from error


def _cases(on_gpu: bool, batch_sizes: str, quick: bool) -> list[Case]:
    if not on_gpu:
        kinds = [
            Case(1, checkpointing, count, NARROW_SIDE)
            for checkpointing in (False, True)
            for count in (10, 30)
        ]
        return [Case(1, False, 5, NARROW_SIDE)] if quick else kinds
    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            "must be numbers with commas", param_hint="--batch-sizes"
        ) from error
    return [
        Case(size, checkpointing, count, FULL_SIDE)
        for size in (sizes[:1] if quick else sizes)
        for checkpointing in ((True,) if quick else (True, False))
        for count in ((10,) if quick else (10, 30))
    ]


class _Bench:
    """The model, the images, and what is measured with them."""

    def __init__(self, place: Path, on_gpu: bool, most: int, steps: int, repeats: int) -> None:
        self._place, self._steps, self._repeats = place, steps, repeats
        self.model = sd15.build(place / "model", 1 if on_gpu else sd15.NARROW)
        side = FULL_SIDE if on_gpu else NARROW_SIDE
        self._images = images.paint(place / "images", most)
        began = time.monotonic()
        self._base = BaseModel.load(
            TrainerOptions(str(self.model), gradient_checkpointing="false", allow_cpu=True)
        )
        loaded = time.monotonic() - began
        first = Case(1, True, min(10, most), side)
        cold, warm = (loops.first_step_seconds(self._base, first, self._images) for _ in range(2))
        self.facts: dict[str, Any] = {
            "machine": machine.describe(self._base.device),
            "model": "SD1.5 in full size" if on_gpu else "SD1.5's layout, an eighth as wide",
            "precision": str(self._base.dtype).removeprefix("torch."),
            "steps_a_leg": steps,
            "pairs": repeats,
            "matrix_teraflops": machine.matrix_rate(self._base.device, self._base.dtype),
            "base_model_load_seconds": loaded,
            "first_step_cold_seconds": loaded + cold,
            "first_step_warm_seconds": warm,
        }

    def measure(self, case: Case) -> dict[str, Any]:
        """One row: pairs of legs, and what a checkpoint costs."""
        base, (run, data) = self._base, self._prepared(case)
        pairs = []
        for number in range(1 + self._repeats):
            console.print(f"[dim]{case}: pair {number} of {self._repeats}[/]", highlight=False)
            pairs.append((loops.ours(base, case, run, data), loops.plain(base, case, run)))
        row = dataclasses.asdict(case) | _compared(case, pairs[1:])
        if base.device.type == "cuda":
            done = row["ours"]["images_per_second"] * machine.TERAFLOP[case.checkpointing]
            row["share_of_matrix_rate"] = done / self.facts["matrix_teraflops"]
        row["checkpoint"] = self._checkpoint_cost(case, data)
        return row

    def _checkpoint_cost(self, case: Case, data: Dataset) -> dict[str, Any]:
        folder = self._place / "work"
        run = loops.run_of(case, self._images, folder, steps=self._steps, every=2)
        parameters = dataclasses.replace(run.parameters, epochs=max(6, run.parameters.epochs))
        run = dataclasses.replace(run, parameters=parameters)
        return loops.checkpoint_cost(self._base, case, run, data)

    def _prepared(self, case: Case) -> tuple[TrainingRun, Dataset]:
        """A run of this case, and its images encoded."""
        folder = self._place / "work"
        run = loops.run_of(case, self._images, folder, steps=self._steps, every=1000)
        self._base.restore_encoders()
        return run, prepare(run, self._base)

    def ask(self, peers: list[Peer], cases: list[Case]) -> list[dict[str, Any]]:
        """The other trainers, case by case; a failure is reported, and the other cases go on."""
        found = []
        for peer in peers:
            for case in cases:
                try:
                    found.append(self._beside(peer, case))
                except PeerFailed as error:
                    console.print(f"{case}: {error}", markup=False)
        return found

    def _beside(self, peer: Peer, case: Case) -> dict[str, Any]:
        """Run this trainer and another one in turn: each leg of the other has ours on both sides.

        Raises:
            PeerFailed: The other trainer cannot be measured.
        """
        run, data = self._prepared(case)
        ours = [loops.ours(self._base, case, run, data).step_seconds]
        theirs = []
        for number in range(self._repeats):
            console.print(f"[dim]{peer.name}, {case}: {number + 1} of {self._repeats}[/]")
            folder, few = self._place / "peer", self._steps
            theirs.append(
                peer.step_seconds(case, self.model, self._images, folder, few=few, many=4 * few)
            )
            ours.append(loops.ours(self._base, case, run, data).step_seconds)
        ratios = [
            2 * step / (before + after)
            for step, before, after in zip(theirs, ours, ours[1:], strict=False)
        ]
        return {
            "peer": peer.name,
            "case": str(case),
            "step_seconds": statistics.median(theirs),
            "legs": theirs,
            "ours": ours,
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "load": round(os.getloadavg()[0], 1),
        }


def _compared(case: Case, pairs: list[tuple[loops.Leg, loops.Leg]]) -> dict[str, Any]:
    """Both sides' figures, and the ratio: the median of the pairs' own."""
    found: dict[str, Any] = {}
    for side, legs in zip(("ours", "plain"), zip(*pairs, strict=True), strict=True):
        step = statistics.median(leg.step_seconds for leg in legs)
        found[side] = {
            "step_seconds": step,
            "steps_per_second": 1 / step,
            "images_per_second": case.batch_size / step,
            "legs": [leg.step_seconds for leg in legs],
            "peak_bytes": max(leg.peak_bytes for leg in legs),
        }
    ratios = [plain.step_seconds / ours.step_seconds for ours, plain in pairs]
    found |= {"ratio": statistics.median(ratios), "ratios": ratios}
    parts = [plain.parts for _, plain in pairs]
    if parts[0]:
        found["plain"]["parts"] = {
            part: statistics.median(each[part] for each in parts) for part in parts[0]
        }
        found["ratio_without_reading"] = statistics.median(
            (plain.step_seconds - plain.parts[loops.READING]) / ours.step_seconds
            for ours, plain in pairs
        )
    return found


def with_lost_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The time of an epoch besides its steps: by two rows that differ only in their images."""
    alike: dict[tuple[int, bool], list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault((row["batch_size"], row["checkpointing"]), []).append(row)
    for few, many in (pair for pair in alike.values() if len(pair) == 2):
        steps = [-(-row["images"] // row["batch_size"]) for row in (few, many)]
        spent = [n * row["ours"]["step_seconds"] for n, row in zip(steps, (few, many), strict=True)]
        slope = (spent[1] - spent[0]) / (steps[1] - steps[0])
        few["epoch_seconds_lost"] = many["epoch_seconds_lost"] = spent[0] - steps[0] * slope
    return rows


def _show(document: dict[str, Any]) -> None:
    on_gpu = document["machine"]["cuda"] is not None
    table = Table(title=f"{document['machine']['device']}, {document['model']}")
    table.add_column("case")
    headings = ["steps/s", "plain", "ratio"]
    if on_gpu:
        headings += ["ckpt epoch", "lost ms/epoch", "images/s", "of matrix rate"]
        headings += ["peak GiB", "plain GiB"]
    else:
        headings.append("without reading")
    for heading in headings:
        table.add_column(heading, justify="right")
    names = [field.name for field in dataclasses.fields(Case)]
    for row in document["results"]:
        cells = [
            str(Case(**{name: row[name] for name in names})),
            f"{row['ours']['steps_per_second']:.2f}",
            f"{row['plain']['steps_per_second']:.2f}",
            f"{row['ratio']:.2f} x",
        ]
        if not on_gpu:
            cells.append(f"{row['ratio_without_reading']:.2f} x")
        else:
            cells += [
                f"{row['checkpoint']['share']:+.1%}",
                f"{1000 * row['epoch_seconds_lost']:.0f}" if "epoch_seconds_lost" in row else "",
                f"{row['ours']['images_per_second']:.2f}",
                f"{row['share_of_matrix_rate']:.0%}",
                f"{row['ours']['peak_bytes'] / 2**30:.2f}",
                f"{row['plain']['peak_bytes'] / 2**30:.2f}",
            ]
        table.add_row(*cells)
    console.print(table)
    if not document["peers"]:
        console.print("diffusers' and kohya's own scripts: not measured (--peer-script).")
    for peer in document["peers"]:
        console.print(
            f"{peer['peer']}, {peer['case']}: we are {peer['ratio']:.2f} x as fast ("
            f"{min(peer['ratios']):.2f} to {max(peer['ratios']):.2f}, {len(peer['ratios'])} pairs, "
            f"load average {peer['load']})."
        )
    console.print(
        f"First step of a cold job {document['first_step_cold_seconds']:.2f} s after the start of "
        f"loading, of a warm one {document['first_step_warm_seconds']:.2f} s after its images "
        "were there."
    )
    if not on_gpu:
        parts = document["results"][0]["plain"]["parts"]
        console.print(
            "Milliseconds of a plain step: "
            + ", ".join(f"{part} {1000 * spent:.1f}" for part, spent in parts.items())
            + "."
        )
        console.print("Without a GPU, only the ratios mean anything.")


def _plot(document: dict[str, Any], file: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot  # pylint: disable=import-outside-toplevel

    rows = document["results"]
    figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.5 * len(rows)), layout="constrained")
    for offset, side in ((-0.2, "ours"), (0.2, "plain")):
        places = [index + offset for index in range(len(rows))]
        axes.barh(places, [row[side]["steps_per_second"] for row in rows], 0.38, label=side)
    names = [field.name for field in dataclasses.fields(Case)]
    labels = [str(Case(**{name: row[name] for name in names})) for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("optimizer steps a second")
    axes.set_title(f"{document['machine']['device']}, {document['model']}")
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
