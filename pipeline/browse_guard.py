"""What stands between the browser's pages and the other pages that a web browser has open.

Any page of the web may send requests to a server on this computer, and a name of its own may lead
here (DNS rebinding). So a request must name this server as its host; one that changes or computes
something must come from a page of ours; and nothing of ours can be framed, embedded or read.
"""

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

POLICY = (
    "default-src 'none'; img-src 'self' blob: data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Not "no-referrer": with it the forms of our own pages would have the origin "null".
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
Next = Callable[[Request], Awaitable[Response]]


def refusal(request: Request, port: int) -> str:
    """Why a request is not answered; "" for one that is.

    Args:
        port: that the server listens on.
    """
    hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
    if port == 80:
        hosts |= {"127.0.0.1", "localhost"}
    host = request.headers.get("host", "")
    if host not in hosts:
        return f"this server is not {host!r}; open http://127.0.0.1:{port}/"
    if request.method not in ("GET", "HEAD") and request.headers.get("origin") != f"http://{host}":
        return "this request does not come from a page of this server"
    site, mode = (request.headers.get(f"sec-fetch-{name}", "") for name in ("site", "mode"))
    if site in ("cross-site", "same-site") and mode != "navigate":
        return "another page cannot use what is here"
    return ""


async def guard(request: Request, call_next: Next) -> Response:
    """Refuse what is not ours; put the headers on all the rest. The port is `app.state.port`."""
    reason = refusal(request, request.app.state.port)
    found = PlainTextResponse(reason, 403) if reason else await call_next(request)
    for name, value in HEADERS.items():
        found.headers.setdefault(name, value)
    found.headers.setdefault("Cache-Control", "no-store")
    return found
