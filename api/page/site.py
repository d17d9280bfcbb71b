"""Puts the page into an application: its routes and its static files."""

from __future__ import annotations

from fastapi import FastAPI, Response
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

from api.page import rendering
from api.page.routes import compare, jobs, language, login, organization, styles

_FOR_EVER = "public, max-age=31536000, immutable"


class PageAssets(StaticFiles):
    """The static files. Their addresses change with their content, so browsers keep them."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """One file."""
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = _FOR_EVER
        response.headers["X-Content-Type-Options"] = "nosniff"

        return response


def add_page(app: FastAPI) -> None:
    """Add the page to an application."""
    app.mount(rendering.ASSETS, PageAssets(directory=rendering.STATIC), name="page-assets")
    for router in (
        login.router,
        styles.router,
        language.router,
        compare.router,
        organization.router,
        jobs.router,
    ):
        app.include_router(router)
