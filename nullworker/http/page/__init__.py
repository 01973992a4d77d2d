"""The status page at `/` of the control port, for a person with a browser, over `ssh -L` if need be.

Three static files without a framework or anything from the internet. The page only uses the routes of this port, and
shows text from callers as text, never as markup. The Content-Security-Policy forbids inline scripts and styles.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from aiohttp import web

_FOLDER: Final = Path(__file__).parent

#: Path on the port, file, content type.
FILES: Final = (
    ("/", "index.html", "text/html"),
    ("/assets/page.css", "page.css", "text/css"),
    ("/assets/page.js", "page.js", "text/javascript"),
)

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


def add_page(app: web.Application) -> None:
    """Serve the page and its assets."""
    for path, name, content_type in FILES:
        app.router.add_get(path, _file((_FOLDER / name).read_bytes(), content_type))


def _file(body: bytes, content_type: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=HEADERS)

    return answer
