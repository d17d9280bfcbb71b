"""The deletion of an organisation removes all that it owns, and nothing of others."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select, update

from api.gate.administration import create_key
from api.life.erasure import erase
from api.store.tables import AuditRow, JobRow, OrganizationRow, Table
from tests.integration.api.world import World
from utils.errors import ConfigurationError


def objects(world: World) -> set[str]:
    """The keys of all objects in the buckets."""
    buckets = world.services.buckets
    return {
        info.key
        for bucket in (buckets.files, buckets.models, buckets.state)
        for info in world.services.s3.list_objects(bucket, "")
    }


def rows_of(world: World, org_id: str, job_ids: list[str]) -> set[str]:
    """The tables with rows of an organisation or of its jobs."""
    found = set()
    with world.services.database.reading() as session:
        for mapper in Table.registry.mappers:
            for row in session.scalars(select(mapper.class_)):
                if getattr(row, "org_id", None) == org_id or (
                    getattr(row, "job_id", None) in job_ids
                ):
                    found.add(str(mapper.local_table))
    return found


def completed(world: World, key: str) -> dict[str, Any]:
    """A job that has ended long ago, with a model, a checkpoint and a record."""
    job = world.order(key=key)
    worker, buckets, client = world.worker(), world.services.buckets, world.services.s3.client
    worker.progress(job, 1_000_001, loss=0.5)
    assert worker.complete(job, 1_000_002).status_code == 200
    style = f"style_{job['subject']}"
    client.put_object(Bucket=buckets.models, Key=f"models/{style}/lora_weights.safetensors")
    for name in (
        *(f"checkpoints/{style}/{job['id']}/1/lora.safetensors", f"jobs/{job['id']}.json"),
        *(f"jobs/{job['id']}.settled", f"archive/{style}/x/a", f"staging/{job['id']}/1/a"),
    ):
        client.put_object(Bucket=buckets.state, Key=name)
    return job


def test_everything_of_the_organisation_goes_and_others_keep_theirs(world: World) -> None:
    admin, other = world.new_key("org_gone", "admin"), world.new_key("org_stays", "train")
    kept = completed(world, other)
    before = objects(world)
    done, waits = completed(world, admin), world.order(key=admin)
    with world.client(admin) as client:
        client.post("/v1/uploads", json={"filename": "a", "bytes": 10}).raise_for_status()
        hook = {"url": "https://customer.example.org/hooks"}
        client.post("/v1/organization/webhook_endpoints", json=hook).raise_for_status()
        refused = client.delete("/v1/organization?confirm=org_stays")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "confirm")
        assert client.delete("/v1/organization?confirm=org_gone").json()["deleted"]
        assert client.get("/v1/jobs").status_code == 401
    ids = [done["id"], waits["id"]]
    assert erase(world.services) == 0, "a job has just ended, or has not ended"
    world.worker().failed(waits, 1_000_001, code="CANCELLED")
    aged = update(JobRow).where(JobRow.id.in_(ids)).values(finished_at=1.0)
    world.services.database.write(lambda session: session.execute(aged))
    assert erase(world.services) == 1
    assert objects(world) == before
    assert rows_of(world, "org_gone", ids) == {"audit_log"}
    assert world.job(kept["id"], other)["status"] == "succeeded"
    assert erase(world.services) == 0


def test_its_id_is_not_given_out_again(world: World) -> None:
    admin = world.new_key("org_gone", "admin")
    with world.client(admin) as client:
        client.delete("/v1/organization?confirm=org_gone").raise_for_status()
    erase(world.services)
    with pytest.raises(ConfigurationError, match="was deleted"):
        create_key(world.services, "org_gone", "again", ["admin"], None)
    with world.services.database.reading() as session:
        assert session.get_one(OrganizationRow, "org_gone").name == ""
        acts = session.scalars(select(AuditRow.act).where(AuditRow.org_id == "org_gone")).all()
    assert acts == ["organization.delete"]
