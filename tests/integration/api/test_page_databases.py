"""The page on both databases: sign in, judge, order, watch, compare, and the deletion of it all."""

from __future__ import annotations

import re

from sqlalchemy import func, select

from api.life import erasure
from api.store.database import now
from api.store.tables import DraftRow, JobRow, OrganizationRow, PageSessionRow
from tests.integration.api.test_page_orders import draft_of, photographs
from tests.integration.api.visitor import Visitor
from tests.integration.api.world import World


def test_a_style_is_ordered_and_compared_and_its_organisation_leaves_nothing(world: World) -> None:
    visitor = Visitor(world, world.key)
    made = []
    for _ in range(2):
        address = draft_of(visitor, photographs())
        fields = {"preset": "quick", "name": "harbour \U0001f6a2"}
        assert visitor.submit(address, address, fields).status_code == 303
        started = visitor.submit(address, f"{address}/start", fields)
        made.append(started.headers["location"].rpartition("/")[2])
    for job_id in made:
        job = world.job(job_id)
        world.worker().progress(job, 1_000_001, loss=0.25, samples=["previews/x/1/0/0.webp"])
        assert world.worker().complete(job, 1_000_002).status_code == 200
    page = visitor.text("/compare?" + "&".join(f"id={each}" for each in made))
    assert [float(each) for each in re.findall(r'<data value="([^"]+)">', page)][:2] == [0.25] * 2
    assert "harbour \U0001f6a2" in visitor.text("/jobs?show=ended")

    def leave(session: object) -> None:
        session.get_one(OrganizationRow, "org_one").deleted_at = now()  # type: ignore[attr-defined]
        for row in session.scalars(select(JobRow)):  # type: ignore[attr-defined]
            row.finished_at = now() - 2 * erasure.QUIET_SECONDS

    world.services.database.write(leave)
    assert visitor.get("/jobs").status_code == 303
    assert erasure.erase(world.services) == 1
    with world.services.database.reading() as session:
        for table in (PageSessionRow, DraftRow):
            assert session.scalar(select(func.count()).select_from(table)) == 0
