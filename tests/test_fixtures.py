"""The fixtures that every test runs under catch what they are there for: each leak fails its test, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CONFTEST = (TESTS / "conftest.py").read_text()


@pytest.fixture
def run(pytester: pytest.Pytester):
    """Run a test file under this suite's conftest, in a process of its own."""

    def run(source: str) -> pytest.RunResult:
        pytester.makeconftest(CONFTEST.replace("ENDING_S = 2.0", "ENDING_S = 0.2"))
        pytester.makepyfile(source)
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-o", f"pythonpath={TESTS}")

    return run


def test_a_test_that_cleans_up_passes(run):
    result = run(
        """
        import os, subprocess, sys, tempfile, threading, time

        import pytest

        def test_tidy(root, tmp_path):
            root.mkdir()
            (tmp_path / "file").write_text("its own folder")
            with tempfile.TemporaryFile():
                pass
            ending = threading.Thread(target=time.sleep, args=(0.05,), daemon=True)
            ending.start()
            os.close(os.open(tmp_path, os.O_RDONLY))

        class Holder:
            def __init__(self, path):
                self.fd, self.itself = os.open(path, os.O_RDONLY), self

            def __del__(self):
                os.close(self.fd)

        def test_a_cycle_is_collected_before_it_is_a_leak(tmp_path):
            Holder(tmp_path)

        def test_an_open_file_may_be_renamed(tmp_path, kept):
            os.rename(kept.name, kept.name + "-renamed")

        @pytest.fixture(scope="module")
        def kept(tmp_path_factory):
            with open(tmp_path_factory.mktemp("kept") / "file", "w") as file:
                yield file

        def test_children_import_this_checkout_wherever_they_start():
            assert os.listdir() == []
            subprocess.run([sys.executable, "-c", "import snapstore"], check=True)

        def test_kernels_that_a_framework_compiled_may_stay():
            os.makedirs(os.path.join(tempfile.gettempdir(), "mlx", "kernels"))
        """
    )
    result.assert_outcomes(passed=5)


@pytest.mark.parametrize("daemon", [True, False])
def test_a_leaked_thread_fails_its_test_and_no_other(run, daemon):
    result = run(
        f"""
        import threading

        stop = threading.Event()

        def test_leaks():
            threading.Thread(target=stop.wait, name="left-behind", daemon={daemon}).start()

        def test_after_it():
            pass

        def test_ends_it():
            stop.set()
        """
    )
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(
        ["*ERROR at teardown of test_leaks*", "leaked 1 threads:", "left-behind (*):", "*in wait*"]
    )


def test_a_thread_of_a_store_that_dies_fails_its_test_unless_it_is_meant_to(run):
    result = run(
        """
        import pytest

        from snapstore import SnapshotStore
        from snapstore.testing import FaultyFileSystem

        def save_with_a_bug(root):
            def die():
                raise SystemExit("a bug")

            files = FaultyFileSystem()
            files.call("create", die, ".tmp")
            with SnapshotStore(root, file_system=files) as store:
                store.save("request", 1, {})
                assert store.flush(10)

        def test_dies(root):
            save_with_a_bug(root)

        @pytest.mark.thread_dies
        def test_is_meant_to(root):
            save_with_a_bug(root)
        """,
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        ["*ERROR at teardown of test_dies*", "*the writer thread died of SystemExit*"]
    )


def test_a_leaked_descriptor_fails_its_test_and_no_other(run):
    result = run(
        """
        import os

        def test_leaks(tmp_path):
            os.open(tmp_path, os.O_RDONLY)

        def test_leaks_a_pipe():
            os.pipe()

        def test_after_it():
            pass
        """
    )
    result.assert_outcomes(passed=3, errors=2)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_leaks *",
            "leaked 1 descriptors:",
            "*ERROR at teardown of test_leaks_a_pipe*",
            "leaked 2 descriptors:",
            "* -> pipe:*",
        ]
    )


def test_a_file_left_elsewhere_fails_its_test_and_no_other(run):
    result = run(
        """
        import os, subprocess, sys, tempfile

        def test_working_folder():
            open("stray", "w").close()

        def test_temporary_folder():
            tempfile.mkdtemp(prefix="stray-")

        def test_a_child_leaves_one():
            subprocess.run([sys.executable, "-c", "import tempfile; tempfile.mkstemp(prefix='stray-')"], check=True)

        def test_after_it():
            assert os.listdir() == os.listdir(tempfile.gettempdir()) == []
        """
    )
    result.assert_outcomes(passed=4, errors=3)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_working_folder*",
            "left outside its folder: */stray",
            "*ERROR at teardown of test_temporary_folder*",
            "left outside its folder: */stray-*",
            "*ERROR at teardown of test_a_child_leaves_one*",
            "left outside its folder: */stray-*",
        ]
    )


def test_the_checks_end_after_the_fixtures_of_the_test(run):
    result = run(
        """
        import threading

        import pytest

        @pytest.fixture(autouse=True)
        def another_autouse():
            stop = threading.Event()
            thread = threading.Thread(target=stop.wait)
            thread.start()
            yield
            stop.set()
            thread.join()

        @pytest.fixture
        def opened(tmp_path):
            with open(tmp_path / "file", "w") as file:
                yield file

        def test_uses_them(opened):
            pass
        """
    )
    result.assert_outcomes(passed=1)


def test_what_a_failed_test_held_is_not_leaked_too(run):
    result = run(
        """
        import os

        class Holder:
            def __init__(self, path):
                self.fd = os.open(path, os.O_RDONLY)

            def __del__(self):
                os.close(self.fd)

        def test_fails(tmp_path):
            holder = Holder(tmp_path)
            try:
                raise ValueError
            except ValueError:
                assert holder.fd < 0

        def test_fails_with_a_cause(tmp_path):
            def inner():
                holder = Holder(tmp_path)
                raise ValueError
            try:
                inner()
            except ValueError as error:
                raise RuntimeError from error

        def test_after_it():
            pass
        """
    )
    result.assert_outcomes(passed=1, failed=2)


def test_deadline_and_eventually_fail_when_time_is_up(run):
    result = run(
        """
        import time

        def test_in_time(deadline, eventually):
            with deadline(5.0):
                eventually(lambda: True)
            eventually(iter([0, 0, 1]).__next__)

        def test_late(deadline):
            with deadline(0.01):
                time.sleep(0.02)

        def test_never(eventually):
            eventually(lambda: False, timeout_s=0.02)
        """
    )
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["*took 0.* s, and 0.01 s were allowed*", "*not true after 0.02 s*"])
