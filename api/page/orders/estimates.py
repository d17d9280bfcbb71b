"""How long a style would train, and what it would cost, from finished trainings on this server."""

from __future__ import annotations

import dataclasses

from sqlalchemy import select
from sqlalchemy.orm import Session

from api.services import Services
from api.store.jobs import MEASURED
from api.store.tables import JobRow
from jobs.style import auto_epochs

KIND = "style"
THOROUGH_RANK = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """The expected training of an order.

    Attributes:
        views: Image views: epochs times images.
        seconds: None before a training has finished here.
        cost: In the currency of `GPU_PRICE_PER_HOUR`; None without the setting or the seconds.
    """

    views: int
    seconds: float | None
    cost: float | None


PRESETS = ("quick", "balanced", "thorough")
_SHARES = {"quick": 1 / 3, "balanced": 1.0, "thorough": 2.0}


def epochs_of(preset: str, images: int) -> int:
    """Passes over the images: the recommended number, a third of it, or twice."""
    return max(1, min(1000, round(auto_epochs(images) * _SHARES[preset])))


def parameters_of(preset: str, images: int) -> dict[str, int | float]:
    """The parameters of a preset."""
    found: dict[str, int | float] = {"epochs": epochs_of(preset, images)}
    if preset == "thorough":
        found |= {"rank": THOROUGH_RANK, "alpha": float(2 * THOROUGH_RANK)}
    return found


def estimates(services: Services, images: int) -> dict[str, Estimate]:
    """The estimate of each preset."""
    with services.database.reading() as session:
        rate = _seconds_per_view(session)
    return {preset: _estimate(services, rate, preset, images) for preset in PRESETS}


def _estimate(services: Services, rate: float | None, preset: str, images: int) -> Estimate:
    views = epochs_of(preset, images) * images
    seconds = None if rate is None else rate * views
    return Estimate(views, seconds, services.cost(seconds))


def _seconds_per_view(session: Session) -> float | None:
    """Seconds for an image view, from the newest finished trainings; their start is included."""
    rows = session.scalars(
        select(JobRow)
        .where(
            JobRow.kind == KIND,
            JobRow.status == "succeeded",
            JobRow.started_at.is_not(None),
            JobRow.finished_at.is_not(None),
        )
        .order_by(JobRow.created_at.desc())
        .limit(MEASURED)
    )
    seconds, views = 0.0, 0.0
    for row in rows:
        epochs = (row.result.get("metadata") or {}).get("training_epochs")
        if isinstance(epochs, int) and epochs > 0 and row.started_at and row.finished_at:
            seconds += row.finished_at - row.started_at
            views += epochs * max(1, len(row.training_files))
    return seconds / views if views else None
