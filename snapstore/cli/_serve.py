"""``snapstore serve``: a root over HTTP, to be looked at."""

from __future__ import annotations

import socket
from importlib.util import find_spec

import click

from snapstore.cli._options import DURATION, chosen_root, json_option, root_options
from snapstore.cli._output import emit_json, note

_NEEDED = {"starlette": "starlette", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


@click.command()
@root_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8420, show_default=True, help="0: any that is free."
)
@click.option("--interval", type=DURATION, default="5s", show_default=True, help="Between two looks.")
@json_option
def serve(
    root: str | None, default_root: str | None, host: str, port: int, interval: int, as_json: bool
) -> int:
    """Show a root over HTTP: a status page, /health, /metrics, /stats, and the files. It only reads.

    Nobody is asked who they are: whoever reaches the port can read every snapshot. So it listens on this machine only,
    unless --host says otherwise.
    """
    missing = [name for module, name in _NEEDED.items() if find_spec(module) is None]
    if missing:
        raise click.UsageError(f"serve needs {' and '.join(missing)}: pip install 'snapstore[server]'")
    import uvicorn

    from snapstore.asgi import create_root_app

    chosen = chosen_root(root, default_root)
    app = create_root_app(chosen, interval_s=max(interval, 1))
    try:
        config = uvicorn.Config(app, host=host, port=port, log_level="warning")
        listening = config.bind_socket()
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio only sees to it for its own
        listening.listen()  # whoever reads the address can connect at once
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listening.getsockname()[1]}/"
        if as_json:
            emit_json("serve", root=chosen, url=url)
        else:
            note(f"Serving {chosen} on {url} (Ctrl-C ends it)")
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        app.state.close()
    return 0
