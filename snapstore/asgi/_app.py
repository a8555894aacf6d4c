"""The routes: the same for a store and for a root, which differ in where their answers come from."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib.resources import files

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.convertors import register_url_convertor
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from snapstore import _paths
from snapstore._store import SnapshotStore
from snapstore.aio import AsyncSnapshotStore, Stream
from snapstore.asgi._answers import (
    HANDLED,
    AnyText,
    as_json,
    check_token,
    error_answer,
    range_of,
    request_id_of,
    timeout_of,
    token_count_of,
)
from snapstore.asgi._root import RootSource
from snapstore.asgi._source import Source, StoreSource
from snapstore.metrics import StoreCollector

register_url_convertor("snapstore_any", AnyText())

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


def create_app(
    store: SnapshotStore | AsyncSnapshotStore,
    *,
    registry: CollectorRegistry | None = None,
    token: str | None = None,
) -> Starlette:
    """An app over an open store, to be run or mounted. It neither opens nor shuts down the store.

    Args:
        store: open before the first request, and shut down by its owner.
        registry: what ``/metrics`` shows; the store's collector is added to it, unless one is there.
        token: what writes must show as a bearer token. ``None``: nobody may write.
    """
    wrapped = store if isinstance(store, AsyncSnapshotStore) else AsyncSnapshotStore(store)
    registry = registry or CollectorRegistry()
    with suppress(ValueError):  # the caller has registered one already
        registry.register(StoreCollector(wrapped.store))
    return _app(StoreSource(wrapped), registry, token)


def create_root_app(root: str | os.PathLike[str], *, interval_s: float = 5.0) -> Starlette:
    """An app that only reads: over a root on which other processes have their stores open, with a status page at ``/``.

    A thread looks at the root every ``interval_s``; requests are answered from its last look. ``RootError`` if the
    root can not be used.
    """
    source = RootSource(os.fspath(root), interval_s)
    registry = CollectorRegistry()
    registry.register(source)
    app = _app(source, registry, None)
    app.router.routes.append(_route("/", _page))
    app.state.close = source.close
    return app


def _app(source: Source, registry: CollectorRegistry, token: str | None) -> Starlette:
    if token is not None and not token.strip():
        raise ValueError("an empty token protects nothing; give None for a server that only reads")
    views = _Views(source, registry, None if token is None else token.encode())
    one = "/requests/{request_id:snapstore_any}"
    app = Starlette(
        routes=[
            _route("/health", views.health),
            _route("/metrics", views.metrics),
            _route("/stats", views.stats),
            _route("/cleanup", views.cleanup_all, "POST"),
            _route(one + "/cleanup", views.cleanup_request, "POST"),
            _route(one + "/snapshots", views.snapshots),
            _route(one + "/snapshots/{tokens}", views.snapshot),
        ],
        exception_handlers=dict.fromkeys(HANDLED, error_answer),
    )
    app.router.redirect_slashes = False
    return app


def _route(path: str, view: Callable[[Request], Awaitable[Response]], method: str = "GET") -> Route:
    return Route(path, view, methods=[method])


class _Views:
    """One method a route."""

    def __init__(self, source: Source, registry: CollectorRegistry, token: bytes | None) -> None:
        self._source = source
        self._registry = registry
        self._token = token

    async def health(self, _: Request) -> Response:
        """200 while saves are taken and written, 503 when not; never blocks."""
        health = self._source.health()
        return as_json(health, 200 if health["status"] in ("ok", "degraded") else 503)

    async def metrics(self, request: Request) -> Response:
        """In the format that the scraper prefers; never blocks."""
        encode, content_type = _encoder_for(request.headers.get("accept", ""))
        return Response(encode(self._registry), headers={"Content-Type": content_type})

    async def stats(self, _: Request) -> Response:
        """One moment; never blocks."""
        return as_json(self._source.stats())

    async def snapshots(self, request: Request) -> Response:
        """What there is of a request."""
        request_id = request_id_of(request)
        return as_json({"request_id": request_id, "snapshots": await self._source.snapshots(request_id)})

    async def snapshot(self, request: Request) -> Response:
        """The file, or a part of it."""
        stream = await self._source.open(request_id_of(request), token_count_of(request))
        try:
            return _file_answer(request, stream)
        except BaseException:
            stream.close()
            raise

    async def cleanup_request(self, request: Request) -> Response:
        """Forget one request."""
        check_token(request, self._token)
        return as_json(await self._source.cleanup(request_id_of(request), timeout_of(request)))

    async def cleanup_all(self, request: Request) -> Response:
        """Forget every request."""
        check_token(request, self._token)
        return as_json(await self._source.cleanup(None, timeout_of(request)))


def _encoder_for(accept: str) -> tuple[Callable[[CollectorRegistry], bytes], str]:
    """The format that is asked for; the plain one where prometheus_client stumbles over the version."""
    try:
        return choose_encoder(accept)
    except (TypeError, ValueError):
        return choose_encoder("")


def _file_answer(request: Request, stream: Stream) -> Response:
    """200 for the whole file, 206 for a part; ``If-Range`` with another tag gets the whole one."""
    tag = f'"{stream.tag}"'
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": tag,
        "Cache-Control": "no-store",
        "Content-Disposition": f'attachment; filename="{_paths.snapshot_name(stream.info.key.token_count)}"',
        "X-Content-Type-Options": "nosniff",
    }
    wanted = request.headers.get("range")
    part = range_of(wanted, stream.nbytes) if request.headers.get("if-range", tag) == tag else None
    start, stop = part or (0, stream.nbytes)
    headers["Content-Length"] = str(stop - start)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{stream.nbytes}"
    stream.limit(start, 0 if request.method == "HEAD" else stop)
    return _Sending(stream, 200 if part is None else 206, headers)


class _Sending(StreamingResponse):
    """Closes the file at the end, also when the client leaves before the first byte."""

    def __init__(self, stream: Stream, status: int, headers: dict[str, str]) -> None:
        super().__init__(stream, status, headers, "application/octet-stream")
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()


async def _page(_: Request) -> Response:
    """Static: it fetches ``/stats`` and ``/health`` by itself, and shows what they say as text, never as HTML."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"})


_PAGE = files("snapstore.asgi").joinpath("status.html").read_text(encoding="utf-8")
