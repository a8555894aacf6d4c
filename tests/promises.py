"""Makes ``docs/trust.md`` of the table below and of the figures in ``trust/results``: ``python tests/promises.py``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
PAGE = CHECKOUT / "docs" / "trust.md"


@dataclass(frozen=True, slots=True)
class Promise:
    """A sentence of the contract, a test that goes red when it is broken, and the file that test is in."""

    words: str
    test: str
    file: str

    @property
    def row(self) -> str:
        where = f"tests/test_{self.file}.py"
        return f"| {self.words} | `{self.test}` | `make test ARGS='{where} -k {self.test}'` |"


PROMISES = (
    Promise(
        "When `save` returns, the tensors may be overwritten",
        "test_the_caller_may_overwrite_the_tensors_when_save_returns",
        "store",
    ),
    Promise(
        "`save` waits for room at most its time, also when the disk hangs",
        "test_a_full_queue_waits_no_longer_than_its_bound_when_the_writer_is_stuck_for_ever",
        "backpressure",
    ),
    Promise(
        "`borrow=True`: the tensors are read until `released`, and not after",
        "test_borrowed_tensors_are_read_until_released_and_not_after",
        "store",
    ),
    Promise(
        "The last accepted save of a key wins, whatever the timing",
        "test_7_the_last_accepted_save_wins_in_whatever_order_they_arrive",
        "state",
    ),
    Promise(
        "A failed re-save leaves the earlier commit readable",
        "test_7_a_failed_resave_keeps_the_earlier_commit",
        "state",
    ),
    Promise(
        "A cleanup cancels nothing that comes after it, even when every wait times out",
        "test_new_saves_of_an_id_are_readable_after_both_cleanups_timed_out",
        "cleanup_races",
    ),
    Promise(
        "A cleanup never waits for another request's I/O",
        "test_a_cleanup_returns_at_once_while_the_writer_is_pinned_on_another_request",
        "cleanup_races",
    ),
    Promise(
        "After `clean=True` no file of that generation exists or will appear",
        "test_a_cleanup_that_waits_is_clean_once_the_writer_has_let_go",
        "cleanup_races",
    ),
    Promise(
        "After `clean=False` the writer undoes what it still makes, and the counter returns to zero",
        "test_a_cleanup_that_times_out_while_the_writer_is_in_the_job_leaves_the_file_to_the_writer",
        "cleanup_races",
    ),
    Promise(
        "A cleanup is bounded also when the disk hangs in a removal",
        "test_a_cleanup_is_bounded_when_the_disk_hangs_in_a_removal",
        "cleanup_races",
    ),
    Promise(
        "`cleanup_all`: N requests cost one wait",
        "test_a_cleanup_of_fifty_requests_on_a_pinned_writer_costs_one_time_out",
        "cleanup_races",
    ),
    Promise(
        "`load` gives the bits back, from memory while pending and from the file after",
        "test_a_snapshot_is_readable_from_memory_while_pending_and_from_disk_after",
        "store",
    ),
    Promise(
        "A loaded snapshot is the caller's own memory",
        "test_a_loaded_snapshot_survives_the_truncation_of_its_file",
        "store",
    ),
    Promise(
        "A file that was altered is corrupt, never wrong numbers", "test_any_flipped_bit_is_found", "store"
    ),
    Promise(
        "A file must be the snapshot that was asked for",
        "test_two_files_that_were_swapped_are_found_out",
        "store",
    ),
    Promise(
        "`detach` moves a file out of every cleanup's reach",
        "test_a_detached_file_is_out_of_reach_of_cleanup",
        "store",
    ),
    Promise(
        "`flush` covers everything accepted before it",
        "test_flush_covers_what_was_accepted_before_it",
        "store",
    ),
    Promise(
        "`stats()` is one moment, and balances",
        "test_10_every_published_value_is_one_moment_in_balance",
        "state",
    ),
    Promise(
        "`health()` never blocks, and says what is stuck",
        "test_health_answers_at_once_and_says_what_is_stuck_in_a_write",
        "space",
    ),
    Promise(
        "`shutdown` refuses saves, drains, and keeps the files",
        "test_shutdown_writes_what_was_accepted_and_keeps_the_files",
        "shutdown",
    ),
    Promise(
        "`shutdown(cleanup=True)` removes the session",
        "test_shutdown_with_cleanup_removes_the_session",
        "shutdown",
    ),
    Promise(
        "`shutdown` returns in time from a wedged disk, and says what it left",
        "test_shutdown_with_a_pinned_writer_returns_in_time_and_says_what_it_left",
        "shutdown",
    ),
    Promise(
        "Concurrent callers of `shutdown` get one report",
        "test_shutdown_is_idempotent_and_concurrent_callers_get_the_same_report",
        "shutdown",
    ),
    Promise(
        "Only a session whose owner is provably dead is reclaimed",
        "test_a_live_session_of_another_process_is_left_alone",
        "sessions",
    ),
    Promise(
        "A kill at any point leaves nothing in doubt",
        "test_a_kill_at_any_operation_leaves_nothing_in_doubt",
        "crash",
    ),
    Promise(
        "With `full`, what was reported is there after a power cut",
        "test_with_full_nothing_that_was_reported_is_lost",
        "powerloss",
    ),
    Promise(
        "Without any sync, a torn file is never taken",
        "test_without_any_sync_a_torn_file_is_never_taken",
        "powerloss",
    ),
    Promise(
        "A fault at any operation on the disk breaks no promise",
        "test_a_fault_at_any_operation_breaks_no_promise",
        "faults",
    ),
    Promise(
        "What was promised holds in any order of the threads",
        "test_what_was_promised_holds_in_any_order",
        "explored",
    ),
    Promise(
        "The protocol holds in every order that a model of it has",
        "test_spin_says_of_the_protocol_what_is_claimed",
        "model",
    ),
    Promise(
        "Nothing outside the root is touched, whatever is swapped in",
        "test_a_link_that_is_swapped_in_at_any_step_leads_nowhere",
        "hostile",
    ),
    Promise(
        "No wait depends on the wall clock", "test_a_wall_clock_that_jumps_by_a_day_changes_no_wait", "time"
    ),
    Promise(
        "Importing snapstore imports no framework and starts nothing",
        "test_importing_snapstore_brings_in_no_framework_no_thread_and_no_signal_handler",
        "layers",
    ),
)


def figures() -> list[str]:
    """A row for each of the long runs: what was counted, when, and how to repeat it."""
    rows = []
    for path in sorted((CHECKOUT / "trust" / "results").glob("*.json")):
        result = json.loads(path.read_text())
        counted = ", ".join(
            f"{name.replace('_', ' ')} {_shown(each)}" for name, each in result["figures"].items()
        )
        rows.append(f"| {result['name']} | {counted} | {result['date']} | `{result['command']}` |")
    return rows


def _shown(figure: object) -> str:
    return f"{figure:,}" if isinstance(figure, (int, float)) else str(figure)


def page() -> str:
    return "\n".join(
        [
            "# Why to trust it",
            "",
            "Made by `make trust` from the table in `tests/promises.py` and from `trust/results`, which the commands",
            "below write; not to be edited. Threats are in `SECURITY.md`, surviving mutants in `trust/mutants.toml`.",
            "",
            "## The long runs",
            "",
            "| run | figures of the last one | date | command |",
            "|---|---|---|---|",
            *figures(),
            "",
            "## Each promise, and a test that goes red when it is broken",
            "",
            "| promise | test | command |",
            "|---|---|---|",
            *(promise.row for promise in PROMISES),
            "",
        ]
    )


def tests_of(file: str) -> set[str]:
    """The tests that a file has."""
    text = (CHECKOUT / "tests" / f"test_{file}.py").read_text()
    return set(re.findall(r"^(?:async )?def (test_\w+)", text, re.MULTILINE))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
