"""Simplifications of the store's protocol that would be bugs: each is planted in a copy of the package, to be found."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Edit:
    """In ``module``, ``right`` becomes ``wrong``."""

    module: str
    right: str
    wrong: str


@dataclass(frozen=True)
class Bug:
    """``only``: the scenario that can bring it out, where it takes more schedules than one has for all of them."""

    name: str
    edits: Sequence[Edit]
    only: str | None = None

    def __str__(self) -> str:
        return self.name

    def plant(self, folder: Path) -> None:
        """Copy the package into ``folder``, with this bug."""
        package = folder / "snapstore"
        shutil.copytree(CHECKOUT / "snapstore", package, ignore=shutil.ignore_patterns("__pycache__"))
        for edit in self.edits:
            path = package / edit.module
            source = path.read_text(encoding="utf-8")
            found = source.count(edit.right)
            assert found == 1, f"{edit.module} has changed: {self.name!r} finds its place {found} times"
            path.write_text(source.replace(edit.right, edit.wrong), encoding="utf-8")


STATE = "_state.py"

BUGS = [
    Bug(
        "one directory for each request id",
        [
            Edit(
                "_session.py",
                "_paths.generation_name(request_id, generation))",
                "_paths.generation_name(request_id, 0))",
            )
        ],
    ),
    Bug(
        "cancelled jobs are counted by request id",
        [
            Edit(
                STATE,
                "self.cancelled_in_hand[life.generation] += 1",
                "self.cancelled_in_hand[life.request_id] += 1",
            ),
            Edit(STATE, "generation = job.life.generation\n", "generation = job.life.request_id\n"),
            Edit(
                STATE,
                "                life.alive and life.newest.get(token_count, 0) < job.sequence",
                "                not self.cancelled_in_hand[life.request_id]\n"
                "                and life.newest.get(token_count, 0) < job.sequence",
            ),
        ],
    ),
    Bug(
        "drained jobs are counted",
        [
            Edit(
                STATE,
                "            self._cancel_locked(job, settled)\n            cleanup.cancelled += 1\n",
                "            self._cancel_locked(job, settled)\n            cleanup.cancelled += 1\n"
                "            self.cancelled_in_hand[life.generation] += 1\n",
            )
        ],
    ),
    Bug(
        "nobody looks after the rename",
        [Edit(STATE, "            if not life.alive:\n                return False\n", "")],
    ),
    Bug(
        "a job is popped before its life is taken",
        [
            Edit(
                STATE,
                "            del self._queue[job]\n            job.life.busy = True\n",
                "            del self._queue[job]\n            self._lock.release()\n            self._lock.acquire()\n"
                "            job.life.busy = True\n",
            )
        ],
    ),
    Bug(
        "a session is taken for dead by its age",
        [
            Edit(
                "_session.py",
                "    for _, name in sorted(dated, reverse=newest_first):\n"
                "        lock = _try_lock(files, join(root, name))\n",
                "    for _, name in sorted(dated)[:-1]:\n"
                "        lock = OwnerLock(files, files.open_directory(join(root, name)))\n",
            )
        ],
    ),
    Bug(
        "an entry leaves by its key",
        [
            Edit(
                STATE,
                "        if job.life.pending.get(job.key.token_count) is job:\n"
                "            del job.life.pending[job.key.token_count]\n",
                "        job.life.pending.pop(job.key.token_count, None)\n",
            )
        ],
    ),
    Bug(
        "a time-out is marked after the wait",
        [
            Edit(
                STATE,
                "            self.cancelled_in_hand[life.generation] += 1\n            cleanup.cancelled += 1\n",
                "            cleanup.cancelled += 1\n",
            ),
            Edit(
                STATE,
                "            self._ledger.cleanup_timeouts += 1\n",
                "            self._ledger.cleanup_timeouts += 1\n"
                "            self.cancelled_in_hand.update(life.generation for life in lives if not life.settled)\n",
            ),
        ],
    ),
    Bug(
        "the writer leaves at the flag",
        [
            Edit(
                STATE,
                "                job = next((job for job in self._queue if not job.life.busy), None)\n",
                "                if self._closing:\n                    return None\n"
                "                job = next((job for job in self._queue if not job.life.busy), None)\n",
            )
        ],
    ),
    Bug(
        "a full queue rolls back by key",
        [
            Edit(
                STATE,
                "            return job\n        finally:\n            self._leave_locked(turn)\n",
                "            return job\n        except BaseException:\n"
                "            turn.life.pending.pop(key.token_count, None)\n            raise\n"
                "        finally:\n            self._leave_locked(turn)\n",
            )
        ],
    ),
]

MORE_BUGS = [
    Bug(
        "nobody wakes the writer",
        [
            Edit(
                STATE,
                'somebody may wait for it or for the last of them."""\n        self._work.notify()\n',
                'somebody may wait for it or for the last of them."""\n',
            )
        ],
    ),
    Bug(
        "the replaced file is unlinked before the rename",
        [
            Edit(
                "_writer.py",
                "        if not self._full:\n            rename_surely(",
                "        if not self._full:\n            self._discard(final)\n            rename_surely(",
            )
        ],
    ),
    Bug(
        "no bell rings at the end of a save",
        [
            Edit(
                STATE,
                "        self._ring()\n        try:\n            if raised",
                "        try:\n            if raised",
            )
        ],
    ),
    Bug(
        "memory is given back while a load reads it",
        [Edit(STATE, "                found.holds += 1\n", "                found.holds += 0\n")],
    ),
    Bug(
        "the save that arrives last wins",
        [Edit(STATE, "life.alive and life.newest.get(token_count, 0) < job.sequence and", "life.alive and")],
    ),
    Bug(
        "what is lent is released at once",
        [
            Edit(
                "_saving.py",
                "    if not offer.borrow:\n        job.ticket._release()\n    engine",
                "    job.ticket._release()\n    engine",
            )
        ],
    ),
    Bug(
        "what could not be adopted is removed",
        [Edit("_adopt.py", "                if not errors:\n", "                if True:\n")],
    ),
    Bug(
        "a device's trouble is looked at twice",
        [Edit("_flights.py", "return Unfit(device, lane.status, lane.error)", "return lane")],
        only="saves from a device",
    ),
    Bug(
        "nobody wakes the cleaner",
        [
            Edit(
                STATE,
                "trashed_bytes - life.doomed_bytes\n            self._rest.notify_all()\n",
                "trashed_bytes - life.doomed_bytes\n",
            )
        ],
    ),
]
