"""How far a training is that counts epochs and measures a loss, for the kinds that do so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.kinds import Shown, Standing
from jobs.record import JobRecord

COUNTERS = {"epochs": "Epochs trained, repeated ones too"}
GAUGES = {"loss": "Mean loss of the last epoch of the newest run"}


def shown(facts: Mapping[str, Any]) -> Shown:
    """The facts of an event of the trainer; see `JobKind.shown`.

    Args:
        facts: `epoch`, the completed epochs; `total_epochs`; and `loss`. Each may be missing.
    """
    epoch, total, loss = facts.get("epoch", 0), facts.get("total_epochs", 0), facts.get("loss")
    return Shown(
        status={"epoch": epoch, "total_epochs": total, "loss": loss},
        numbers={"current_epoch": epoch, "total_epochs": total, "last_loss": loss},
        counts={"epochs": epoch},
        gauges={"loss": loss},
        # The record holds whole epochs; a part of one counts from its end.
        record={"epoch_seen": int(epoch), "loss_seen": round(loss or 0.0, 6)},
    )


def standing(record: JobRecord | None, total: float | None) -> Standing:
    """The epochs of a job; see `JobKind.standing`.

    They are those of the newest checkpoint, or of the worker's last sign of life if that is
    further. Of a completed job they are those that were trained.

    Args:
        record: The record, or None.
        total: The epochs of the order; None if not known.
    """
    if record is None:
        return Standing(0, total, "epoch", {"loss": None})
    if record.ending and (trained := record.ending.body.get("training_metric")):
        done, loss = trained.get("epochs") or 0, trained.get("loss")
        return Standing(done, total, "epoch", {"loss": loss})
    done = record.checkpoint.epoch if record.checkpoint else 0
    if not record.hold.released:
        done = max(done, record.epoch_seen)
    return Standing(done, total, "epoch", {"loss": record.loss_seen or None})
