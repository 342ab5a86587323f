"""The web page: type a sentence, see the mask, correct it. Nothing it loads or sends leaves the machine."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
from fastapi import FastAPI
from starlette.routing import Mount

from tmca.server.page.layout import build_page
from tmca.server.page.local import LocalOnly

if TYPE_CHECKING:
    from tmca.server.engine import Engine
    from tmca.server.settings import ServerSettings

SYSTEM_FONTS = ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONOSPACE_FONTS = ("ui-monospace", "Consolas", "Menlo", "monospace")
ICON = (
    "<link rel=\"icon\" href=\"data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Crect width='16' height='16' rx='3' fill='%23134e5e'/%3E%3Ccircle cx='8' cy='8' r='4' fill='%23ffc800'/%3E"
    '%3C/svg%3E">'
)


def mount_page(app: FastAPI, engine: Engine, settings: ServerSettings, folder: Path) -> FastAPI:
    """Serve the page at ``/``, behind all routes that are there already.

    Args:
        app: The server's application.
        engine: Answers what the page asks.
        settings: Limits.
        folder: For what is uploaded; removed when the server ends, and its files after an hour.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    page = build_page(engine, settings)
    page.has_launched = True  # else Gradio does not ask whether a file was uploaded
    routes = list(app.routes)
    here = files(__name__)
    scripts = "\n".join(here.joinpath(name).read_text("utf-8") for name in ("editor.js", "page.js"))
    app = gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=settings.max_upload,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Base(
            primary_hue=gr.themes.colors.teal,
            neutral_hue=gr.themes.colors.slate,
            font=SYSTEM_FONTS,
            font_mono=MONOSPACE_FONTS,
        ),
        css=here.joinpath("page.css").read_text("utf-8"),
        head=f"{ICON}<script>{scripts}</script>",
    )
    route = app.routes[-1]
    if isinstance(route, Mount):
        route.app = LocalOnly(route.app, folder, routes, app.state.stopping)
    return app
