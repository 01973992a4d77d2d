"""The status page at `/` of the control port: for a person with a browser, over `ssh -L` if need be.

It is three files, read once, with no framework and nothing from the internet: the page asks this port alone, by the
same routes as everybody else, and shows what a caller has sent as text and never as markup. The policy below makes
the browser hold us to that.

The one rule: no script and no style stands in the markup.
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
