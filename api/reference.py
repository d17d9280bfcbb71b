"""The reference pages, `/docs` (Swagger UI) and `/redoc`. Their scripts come from this server."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

_ASSETS = "/reference-assets"
_PACKAGE = "fastapi_offline"
"""Its folder `static` has the scripts of both pages. Nothing else of it is used."""


def add_reference(app: FastAPI) -> None:
    """Add the pages to an application."""
    folder = Path(str(importlib.resources.files(_PACKAGE))) / "static"
    app.mount(_ASSETS, StaticFiles(directory=folder), name="reference-assets")

    @app.get("/docs", include_in_schema=False)
    def swagger() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url=app.openapi_url or "",
            title=app.title,
            swagger_js_url=f"{_ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{_ASSETS}/swagger-ui.css",
            swagger_favicon_url=f"{_ASSETS}/favicon.png",
        )

    @app.get("/redoc", include_in_schema=False)
    def redoc() -> HTMLResponse:
        return get_redoc_html(
            openapi_url=app.openapi_url or "",
            title=app.title,
            redoc_js_url=f"{_ASSETS}/redoc.standalone.js",
            redoc_favicon_url=f"{_ASSETS}/favicon.png",
            with_google_fonts=False,
        )
