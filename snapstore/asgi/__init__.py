"""Starlette apps for operators: ``create_app(store)`` beside an engine, ``create_root_app(root)`` beside a disk.

    app.mount("/snapstore", create_app(store, token=os.environ["SNAPSTORE_TOKEN"]))

``/health``, ``/stats`` and ``/metrics`` are answered on the event loop from what the store has published: also while
its disk and its device hang. Files are streamed by the few threads of ``snapstore.aio``.
"""

from snapstore.asgi._app import create_app, create_root_app

__all__ = ["create_app", "create_root_app"]
