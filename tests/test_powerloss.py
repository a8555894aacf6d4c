"""The power goes at any moment: no state of the disk that POSIX allows then lets a torn snapshot be loaded, and with
``durability="full"`` none of them lacks what had been reported. Whatever is left out of the code, the replay finds.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from power import (
    OUTSIDE,
    ROOT,
    SCENARIOS,
    Durability,
    Scenario,
    Survey,
    detaches,
    detaches_across,
    dies_and_is_rescued,
    hands_over,
    look,
    loses_its_session,
    recorded,
    replaces,
    rescues,
    saves,
)
from trust_results import record

from snapstore import StoreOptions, _paths
from snapstore._files import FileSystem
from snapstore.testing import PowerCut, RecordingFileSystem

WINDOWS: dict[Durability, int] = {"full": 3, "data": 3, "none": 2}
WIDE_WINDOWS: dict[Durability, int] = {"full": 12, "data": 9, "none": 4}


@pytest.fixture(autouse=True)
def short_turns() -> Iterator[None]:
    """Thousands of stores are opened, and each waits for its threads to take their turns."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)
    yield
    sys.setswitchinterval(before)


def surveyed(
    scenario: Scenario,
    options: StoreOptions,
    disk: RecordingFileSystem | None = None,
    *,
    opening: bool = False,
) -> Survey:
    survey = Survey(
        options.durability,
        WINDOWS[options.durability],
        discard_every=16,
        opening=opening,
        until_broken=disk is not None,
    )
    survey.add(recorded(scenario, options, disk))
    return survey


# -- what is promised -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_with_full_nothing_that_was_reported_is_lost(scenario: Scenario) -> None:
    survey = surveyed(scenario, StoreOptions(durability="full"), opening=scenario is saves)
    assert survey.broken == []
    assert survey.corrupt == survey.stranded == 0 < survey.images


@pytest.mark.parametrize("scenario", [saves, replaces, detaches_across, hands_over])
def test_with_data_a_file_is_whole_or_not_there(scenario: Scenario) -> None:
    """Also without checksums. What was reported may not be there: the renames are not synced."""
    survey = surveyed(scenario, StoreOptions(durability="data", checksum=False))
    assert survey.broken == []
    assert survey.corrupt == survey.torn == survey.stranded == 0 < survey.missing


@pytest.mark.parametrize("scenario", [saves, replaces, detaches, hands_over])
def test_without_any_sync_a_torn_file_is_never_taken(scenario: Scenario) -> None:
    survey = surveyed(scenario, StoreOptions(durability="none"))
    assert survey.broken == []
    assert survey.torn == 0 < survey.missing


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.powerloss)])
def test_what_a_killed_process_left_is_safe_once_it_is_adopted(every: int) -> None:
    """It had synced nothing, and the kernel written nothing, when the power goes and the next store is open."""
    options, changes, died, figures = StoreOptions(durability="full"), 0, True, Counter[str]()
    while died:
        disk = RecordingFileSystem(write_bytes_max=480)
        died = dies_and_is_rescued(disk, options, changes)
        survey = Survey("full", WINDOWS["full"], discard_every=50, opening=False)
        survey.add(disk)
        assert survey.broken == [], changes
        figures.update(kills=1, states=survey.states, images=survey.images)
        changes += every
    assert figures["states"] > 50 * figures["kills"] > 100
    if every == 1:
        record("powerloss-after-kill", "make powerloss", **figures)


@pytest.mark.powerloss
@pytest.mark.timeout(1800)
def test_every_promise_in_wide_windows() -> None:
    figures = dict.fromkeys(("states", "images", "torn", "lost_with_full"), 0)
    for durability, window in WIDE_WINDOWS.items():
        for scenario in SCENARIOS:
            # Of what a store without any sync has left, everything is still on its way.
            survey = Survey(durability, WIDE_WINDOWS["none"] if scenario is rescues else window)
            survey.add(recorded(scenario, StoreOptions(durability=durability)))
            assert survey.broken == [], (scenario, durability)
            assert survey.stranded == 0 or durability == "none"
            figures["states"] += survey.states
            figures["images"] += survey.images
            figures["torn"] += survey.torn
            figures["lost_with_full"] += survey.missing if durability == "full" else 0
            figures[f"states_{durability}"] = figures.get(f"states_{durability}", 0) + survey.states
            figures[f"corrupt_{durability}"] = figures.get(f"corrupt_{durability}", 0) + survey.corrupt
            figures[f"missing_{durability}"] = figures.get(f"missing_{durability}", 0) + survey.missing
    assert figures["corrupt_none"] > 0 == figures["torn"] == figures["lost_with_full"]
    windows = ", ".join(f"{durability} {window}" for durability, window in WIDE_WINDOWS.items())
    record("powerloss", "make powerloss", **figures, windows=windows)


def test_real_folders_are_opened_as_the_disks_in_memory_are(tmp_path: Path) -> None:
    cuts = list(recorded(hands_over, StoreOptions(durability="none")).power_cuts(window=WINDOWS["none"]))
    chosen = cuts[:: len(cuts) // 40]
    assert {len(cut.lost) for cut in chosen} == {0, 1, 2}
    for number, cut in enumerate(chosen):
        folder = tmp_path / str(number)
        written_out(cut, folder)
        assert look(FileSystem(), f"{folder}{ROOT}", "adopt") == look(cut.disk(), ROOT, "adopt"), cut.lost


def written_out(cut: PowerCut, folder: Path) -> None:
    folder.mkdir()
    for path, data in sorted(cut.tree.items()):
        place = folder / path[1:]
        if data is None:
            place.mkdir(mode=0o700)
        else:
            place.write_bytes(data)


# -- teeth: what the replay finds when something is left out --------------------------------------------------------


class Forgetful(RecordingFileSystem):
    """Says that it has synced, and has not: snapshots, or the directories of which ``skips`` says so."""

    def __init__(self, *, data: bool = False, skips: Callable[[str], bool] = lambda path: False) -> None:
        super().__init__(write_bytes_max=480)
        self._data = data
        self._skips = skips
        self._snapshots: set[int] = set()
        self.skipped = 0

    def create(self, path: str, *, dir_fd: int | None = None) -> int:
        fd = super().create(path, dir_fd=dir_fd)
        if _paths.TEMPORARY in path:
            self._snapshots.add(fd)
        return fd

    def open_read(self, path: str, *, dir_fd: int | None = None) -> int:
        fd = super().open_read(path, dir_fd=dir_fd)
        self._snapshots.add(fd)
        return fd

    def sync_data(self, fd: int) -> None:
        if not self._data or fd not in self._snapshots:
            super().sync_data(fd)

    def sync_directory(self, path: str) -> None:
        if self._skips(path):
            self.skipped += 1
        else:
            super().sync_directory(path)


def is_generation(path: str) -> bool:
    return _paths.parse_generation_name(path.rpartition("/")[2]) is not None


def is_session(path: str) -> bool:
    return _paths.is_session_name(path.rpartition("/")[2])


def is_unborn_session(path: str) -> bool:
    return _paths.is_unfinished_session_name(path.rpartition("/")[2])


@pytest.mark.parametrize(
    ("scenario", "skips"),
    [
        pytest.param(saves, is_generation, id="the request's directory"),
        pytest.param(saves, is_session, id="the session"),
        pytest.param(saves, lambda path: path == ROOT, id="the root"),
        pytest.param(saves, lambda path: path == "/data/snapshots", id="the root's parent"),
        pytest.param(saves, lambda path: path == "/data", id="a parent that was made"),
        pytest.param(saves, lambda path: path == "/", id="the top"),
        pytest.param(saves, is_unborn_session, id="what a session begins with"),
        pytest.param(replaces, is_generation, id="the directory of a replaced file"),
        pytest.param(hands_over, is_session, id="the session that adopts"),
        pytest.param(rescues, is_generation, id="the request's directory that is adopted"),
        pytest.param(detaches, lambda path: OUTSIDE.startswith(path + "/"), id="where a file was moved to"),
        pytest.param(loses_its_session, lambda path: path == ROOT, id="the root of a session made again"),
    ],
)
def test_a_directory_that_is_not_synced_is_found(scenario: Scenario, skips: Callable[[str], bool]) -> None:
    disk = Forgetful(skips=skips)
    survey = surveyed(scenario, StoreOptions(durability="full"), disk)
    assert disk.skipped > 0
    assert survey.broken or survey.stranded


def test_files_that_are_not_synced_are_found() -> None:
    """Lost with ``full``, corrupt with ``data``, and taken for good where there is no checksum either."""
    assert surveyed(saves, StoreOptions(durability="full"), Forgetful(data=True)).broken
    assert surveyed(rescues, StoreOptions(durability="full"), Forgetful(data=True)).broken
    survey = surveyed(saves, StoreOptions(durability="data"), Forgetful(data=True))
    assert survey.corrupt and survey.broken and not survey.torn
    survey = surveyed(saves, StoreOptions(durability="data", checksum=False), Forgetful(data=True))
    assert survey.torn and survey.broken


def test_checksums_that_are_not_there_are_missed() -> None:
    survey = surveyed(saves, StoreOptions(durability="none", checksum=False))
    assert survey.torn and survey.broken


# -- the model ------------------------------------------------------------------------------------------------------


def states(disk: RecordingFileSystem, window: int = 9) -> set[tuple[tuple[str, bytes | None], ...]]:
    """What the disk may hold at the end of the record."""
    cuts = list(disk.power_cuts(window=window))
    return {tuple(sorted(cut.tree.items())) for cut in cuts if cut.position == cuts[-1].position}


def test_bytes_are_there_or_in_part_or_not_until_the_file_is_synced() -> None:
    disk = RecordingFileSystem()
    fd = disk.create("/a")
    disk.sync_directory("/")
    disk.write(fd, [memoryview(b"12")], 0)
    assert states(disk) == {(("/a", data),) for data in (b"12", b"", b"\0\0", b"1\0", b"\xdb\xdb")}
    disk.write(fd, [memoryview(b"3")], 2)
    assert (("/a", b"\0\x003"),) in states(disk)  # the later one without the earlier one
    assert (("/a", b"12"),) in states(disk)
    disk.sync_data(fd)
    assert states(disk) == {(("/a", b"123"),)}
    disk.close(fd)


def test_a_sync_of_a_file_brings_no_name_and_one_of_a_directory_no_bytes() -> None:
    disk = RecordingFileSystem()
    fd = disk.create("/a")
    disk.write(fd, [memoryview(b"1")], 0)
    disk.sync_data(fd)
    assert states(disk) == {(), (("/a", b"1"),)}
    disk.write(fd, [memoryview(b"2")], 1)
    disk.sync_directory("/")
    assert {data for ((_, data),) in states(disk)} >= {b"1", b"12"}
    disk.close(fd)


def test_names_change_in_any_order_but_each_in_its_own() -> None:
    disk = RecordingFileSystem()
    for path in ("/a", "/b"):
        disk.close(disk.create(path))
    disk.rename("/a", "/c")
    empty = {path: (f"/{path}", b"") for path in "abc"}
    expected = {"", "a", "b", "ab", "c", "bc"}  # never both /a and /c, never /c without /a having been
    assert states(disk) == {tuple(empty[path] for path in paths) for paths in expected}


def test_a_rename_between_directories_is_there_whole_once_either_is_synced() -> None:
    disk = RecordingFileSystem()
    for path in ("/a", "/b"):
        disk.make_directory(path)
    disk.close(disk.create("/a/file"))
    for path in ("/", "/a"):
        disk.sync_directory(path)
    both = (("/a", None), ("/b", None))
    disk.rename("/a/file", "/b/file")
    assert states(disk) == {(*both[:1], ("/a/file", b""), both[1]), (*both, ("/b/file", b""))}
    disk.sync_directory("/b")
    assert states(disk) == {(*both, ("/b/file", b""))}


def test_of_what_is_older_than_the_window_one_change_is_missing_at_a_time() -> None:
    disk = RecordingFileSystem()
    for path in ("/a", "/b", "/c"):
        disk.close(disk.create(path))
    disk.rename("/a", "/d")
    found = {"".join(path[1:] for path, _ in each) for each in states(disk, window=1)}
    assert found == {"bcd", "abc", "bc", "cd", "bd"}  # without /a there is no /d, and all of the rest
    assert len(states(disk, window=4)) == 12


def test_marks_say_what_had_happened() -> None:
    disk = RecordingFileSystem()
    disk.mark("before")
    disk.close(disk.create("/a"))
    disk.mark("after")
    cuts = list(disk.power_cuts())
    assert [cut.marks for cut in cuts] == [(), ("before",)] + 2 * [("before",)] + 2 * [("before", "after")]
    assert [cut.lost for cut in cuts if not cut.lost] == [()] * 4
    assert {path for cut in cuts for path in cut.disk().tree()} == {"/a"}
