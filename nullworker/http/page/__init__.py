"""The status page at `/` of the control port, for a person with a browser, over `ssh -L` if need be.

A few static files without a framework or anything from the internet. The page only uses the routes of this port, and
shows text from callers as text, never as markup. The Content-Security-Policy forbids inline scripts and styles.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

from aiohttp import web

_FOLDER: Final = Path(__file__).parent

#: By their paths on the port: what every page of this project has, and the worker's own.
SHARED: Final[dict[str, Path]] = {
    "/assets/lib.js": _FOLDER / "lib.js",
    "/assets/page.css": _FOLDER / "page.css",
}
FILES: Final[dict[str, Path]] = {"/": _FOLDER / "index.html", "/assets/page.js": _FOLDER / "page.js"}
CONTENT_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

HEADERS: Final = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "connect-src 'self'",
            "img-src data:",  # the icon of the tab, which is drawn in the colour of the state
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    ),
    "Cache-Control": "no-cache",  # after an update of the worker, the old script must not meet the new routes
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_page(app: web.Application, files: Mapping[str, Path] = FILES) -> None:
    """Serve a page and its assets, by their paths, and what the pages share."""
    for path, file in {**SHARED, **files}.items():
        app.router.add_get(path, _file(file.read_bytes(), CONTENT_TYPES[file.suffix]))


def _file(body: bytes, content_type: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=HEADERS)

    return answer
