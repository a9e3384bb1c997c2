"""The door of the console: every request passes it before a handler sees it, and every answer after."""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from moe_core.clock import Clock
from moe_tuner.console import pages
from moe_tuner.console.rights import MARK, Right, Tokens, known_host, own_page

ROOT, API = "/console/", "/console/api/"
SESSION, ORDERS = f"{API}session", f"{API}orders"
PUBLIC = {f"{ROOT}signin.mjs": "signin.mjs", f"{ROOT}console.css": "console.css"}
"""What a sign-in needs. It is the same everywhere, and says nothing of what is tuned here."""


def guard(tokens: Tokens, hosts: frozenset[str], clock: Clock, *, everywhere: bool) -> Middleware:
    """Refuses strangers, names that are not ours, and changes that no page of ours asked for."""

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        ours = request.path.startswith(ROOT) or request.path == ROOT.rstrip("/")
        if (ours or everywhere) and not known_host(request.headers.get("Host", ""), hosts):
            return pages.error("this is not the host that was asked for", 421)
        right = right_of(request, tokens, clock.time())
        if not ours:
            # Metrics and health stay open, to be scraped and probed; orders are signed.
            private = request.path.startswith("/v1/") and request.method in ("GET", "HEAD")
            return pages.error("a token is needed", 401) if private and right is Right.NONE else await handler(request)
        try:
            refused = refusal(request, right)
            response = await handler(request) if refused is None else refused
        except web.HTTPException as error:
            # aiohttp's own answers (no such path, no such method, too large) say no more than their status.
            response = pages.error(error.reason, error.status)
        if not response.prepared:
            response.headers.update(pages.SAFETY)
        return response

    return guarded


def right_of(request: web.Request, tokens: Tokens, now_s: float) -> Right:
    """By a bearer token, for programs, else by cookies."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if token:
        return tokens.of_token(token) if scheme.lower() == "bearer" else Right.NONE
    for right in (Right.OPERATE, Right.READ):
        cookie = request.cookies.get(cookie_name(request, right), "")
        if tokens.of_cookie(right, cookie, now_s) is right:
            return right
    return Right.NONE


def cookie_name(request: web.Request, right: Right) -> str:
    """Cookies know no ports: two stacks on one machine need two names."""
    _, _, port = request.headers.get("Host", "").rpartition(":")
    return f"moestack-{port if port.isdecimal() else 'console'}-{right.name.lower()}"


def refusal(request: web.Request, right: Right) -> web.Response | None:
    """Why a request is not heard, or None."""
    if request.method in ("GET", "HEAD"):
        if right >= Right.READ or request.path in PUBLIC or request.path in (ROOT, ROOT.rstrip("/")):
            return None
        return pages.error("a token is needed", 401)
    signs_in = (request.method, request.path) == ("POST", SESSION)
    if right is Right.NONE and not signs_in:
        return pages.error("a token is needed", 401)
    host = request.headers.get("Host", "")
    if not own_page(request.headers, frozenset({f"http://{host}", f"https://{host}"})):
        return pages.error(f"not from a page of the console: the header {MARK} is missing, or another origin asks", 403)
    if request.path != SESSION and right < Right.OPERATE:
        return pages.error("the operator's token is needed", 403)
    return None
