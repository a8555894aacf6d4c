"""A server's process with a HiCache backend of its own, which does what it is told, a line an order.

    python sglang_process.py ROOT            # with a stand-in for SGLang's interface
    python sglang_process.py ROOT FOLDER     # with SGLang's own files, below this folder

It answers a line of JSON to each of: ``set OWNER COUNT``, ``has OWNER COUNT`` (whether each page is there, and right),
``clear``, ``flush``, ``close``.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import stand_ins
from sglang_contract import HostPool, config, page_of, same, torch


def backend_on(root: str, folder: str | None) -> Any:
    """As the engine's factory builds it from configuration; where that is not, without it."""
    said = {"backend_name": "snapstore", "root_dir": root}
    said |= {"module_path": "snapstore.integrations.sglang", "class_name": "SnapstoreHiCache"}
    if folder is None:
        return importlib.import_module(said["module_path"]).SnapstoreHiCache(config(said), {})
    factory = importlib.import_module("sglang.srt.mem_cache.storage").StorageBackendFactory
    return factory.create_backend("dynamic", config(said), HostPool())


def does(backend: Any, order: str, owner: str = "", count: str = "0") -> Any:
    pages = [page_of(owner, number) for number in range(int(count))]
    if order == "set":
        return [backend.set(key, page) for key, page in pages]
    if order == "has":
        found = [backend.get(key, torch.zeros_like(page)) for key, page in pages]
        return [got is not None and same(got, page) for got, (_, page) in zip(found, pages, strict=True)]
    if order == "flush":
        return backend.blocks.snapshots.flush(10)
    return {"clear": backend.clear, "close": backend.close}[order]()


def main(root: str, folder: str | None = None) -> None:
    engine = stand_ins.sglang() if folder is None else stand_ins.around_sglang(folder)
    with stand_ins.modules(**engine):
        backend = backend_on(root, folder)
        say("ready")
        for line in sys.stdin:
            say(does(backend, *line.split()))


def say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
