"""Pages of lists: `limit`, `after` (the last id of the page before) and `order`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from fastapi import Depends, Query
from sqlalchemy import Select, and_, or_
from sqlalchemy.orm import Session

from api.gate.problems import Problem


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """The page that a request asks for."""

    limit: int
    after: str | None
    order: Literal["asc", "desc"]

    def rows(self, session: Session, query: Select[Any], table: Any) -> tuple[list[Any], bool]:
        """The rows of the page, and whether more follow.

        Args:
            query: Selects the rows that the caller may see.
            table: Their table, with `created_at` and `id`.

        Raises:
            Problem: There is no row `after`.
        """
        if self.after is not None:
            last = session.scalar(query.where(table.id == self.after))
            if last is None:
                raise Problem(
                    "invalid_parameter",
                    f"after: there is nothing with the id {self.after} in this list.",
                    param="after",
                )
            query = query.where(self._beyond(table, last))
        by = (table.created_at, table.id)
        if self.order == "desc":
            by = (table.created_at.desc(), table.id.desc())
        rows = list(session.scalars(query.order_by(*by).limit(self.limit + 1)))
        return rows[: self.limit], len(rows) > self.limit

    def _beyond(self, table: Any, last: Any) -> Any:
        at, same = table.created_at, table.created_at == last.created_at
        if self.order == "desc":
            return or_(at < last.created_at, and_(same, table.id < last.id))
        return or_(at > last.created_at, and_(same, table.id > last.id))


def _page(
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=255)] = None,
    order: Literal["asc", "desc"] = "desc",
) -> Page:
    return Page(limit, after, order)


Paged = Annotated[Page, Depends(_page)]
