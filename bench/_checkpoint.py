"""torch's own way to save without holding up the caller: ``torch.distributed.checkpoint.async_save``, one process."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench._work import fresh_folder

Checkpointer = Callable[[dict[str, Any], Path], Any]


@contextmanager
def checkpointer() -> Iterator[Checkpointer | None]:
    """Begins a save; returns when its tensors are staged, in memory that it keeps. ``None`` where it does not work."""
    import torch
    import torch.distributed as dist

    begin: Checkpointer | None = None
    with fresh_folder() as folder:
        try:
            rendezvous = f"file://{folder}/rendezvous"
            dist.init_process_group("cpu:gloo,cuda:gloo", init_method=rendezvous, rank=0, world_size=1)
            finished(_with_own_memory()({"a": torch.zeros(1, device="cuda")}, folder / "trial"))
            begin = _with_own_memory()
        except Exception:  # noqa: BLE001 - the others are measured without it
            begin = None
            print(f"device: no async_save here\n{traceback.format_exc()}", flush=True)
        try:
            yield begin
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _with_own_memory() -> Checkpointer:
    from torch.distributed.checkpoint.staging import BlockingAsyncStager
    from torch.distributed.checkpoint.state_dict_saver import async_save

    stager = BlockingAsyncStager(cache_staged_state_dict=True)
    return lambda tensors, path: async_save(tensors, checkpoint_id=path, async_stager=stager)


def finished(begun: Any) -> None:
    """Wait until it is on disk."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        getattr(begun, "upload_completion", begun).result()
    except CheckpointException as error:  # which is no Exception
        raise RuntimeError(str(error)) from error
