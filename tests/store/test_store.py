"""Compiled kernels on disk: races, killed processes, damaged entries, folders that cannot be written."""

import hashlib
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from regnet_fast import store
from regnet_fast.store import CacheWarning, key, stored

ROOT = Path(__file__).resolve().parents[2]
CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REGNET_FAST_CACHE", str(tmp_path))
    store._warned.clear()


def unmade():
    raise AssertionError("it is there already")


def entry(tmp_path, name="k"):
    return tmp_path / "kernels" / name


def test_made_once(tmp_path):
    assert stored("k", lambda: CONTENT) == CONTENT
    assert stored("k", unmade) == CONTENT
    assert stored("other", lambda: b"") == b"" and stored("other", unmade) == b""
    assert sorted(p.name for p in (tmp_path / "kernels").iterdir()) == ["k", "k.lock", "other", "other.lock"]


def test_a_key_knows_where_its_parts_end():
    keys = {key("ab", "c"), key("a", "bc"), key("abc"), key("ab", "c", ""), key(b"ab", "d")}
    assert len(keys) == 5 and key("ab", "c") == key(b"ab", b"c")


def test_folders(monkeypatch):
    monkeypatch.delenv("REGNET_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert store.user_folder() == Path("/x/regnet_fast/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.user_folder() == Path.home() / ".cache/regnet_fast/kernels"


DAMAGE = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[:-1],
    "cut in the digest": lambda data: data[:7],
    "longer": lambda data: data + b"x",
    "a flipped bit": lambda data: data[:99] + bytes([data[99] ^ 1]) + data[100:],
    "other content": lambda data: data[:32] + b"x",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_entry_is_made_again(tmp_path, what):
    stored("k", lambda: CONTENT)
    path = entry(tmp_path)
    path.write_bytes(DAMAGE[what](path.read_bytes()))
    assert stored("k", lambda: CONTENT + b"again") == CONTENT + b"again"
    assert stored("k", unmade) == CONTENT + b"again"


def test_what_the_maker_raises_is_raised_and_nothing_kept(tmp_path):
    def fails():
        raise OSError("of the compiler's own")

    with warnings.catch_warnings(), pytest.raises(OSError, match="compiler's own"):
        warnings.simplefilter("error")
        stored("k", fails)
    assert not entry(tmp_path).exists()
    assert stored("k", lambda: CONTENT) == CONTENT


def child(code: str, *arguments: object) -> subprocess.Popen:
    """A process with the store alone."""
    head = (
        "import importlib.util, os, pathlib, sys, time\n"
        f"spec = importlib.util.spec_from_file_location('store', {store.__file__!r})\n"
        "store = importlib.util.module_from_spec(spec); spec.loader.exec_module(store)\n"
    )
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


RACE = """
def make():
    with open(sys.argv[1], "a") as file: file.write("made\\n")
    time.sleep(0.3)
    return b"content" * 1000
while not os.path.exists(sys.argv[2]): time.sleep(0.001)
print(len(store.stored("k", make)))
"""


def test_processes_that_race_make_it_once(tmp_path):
    log, start = tmp_path / "log", tmp_path / "start"
    racers = [child(RACE, log, start) for _ in range(4)]
    start.touch()
    assert [racer.communicate(timeout=60)[0] for racer in racers] == ["7000\n"] * 4
    assert log.read_text() == "made\n"


KILLED = """
def make():
    print("making", flush=True)
    if sys.argv[1] == "writing":
        replace = os.replace
        store.os.replace = lambda *a: (print("writing", flush=True), time.sleep(60))
        return b"half"
    time.sleep(60)
store.stored("k", make)
"""


@pytest.mark.parametrize("when", ["making", "writing"])
def test_a_killed_process_leaves_nothing_in_the_way(tmp_path, when):
    process = child(KILLED, when)
    for line in process.stdout:
        if line.strip() == when:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    begin = time.monotonic()
    assert stored("k", lambda: CONTENT) == CONTENT
    assert time.monotonic() - begin < 5
    assert sorted(p.name for p in (tmp_path / "kernels").iterdir()) == ["k", "k.lock"]


def unwritable(tmp_path, monkeypatch):
    """As a folder that may not be written, also for root."""

    def refused(**kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store.tempfile, "mkstemp", refused)


def full(tmp_path, monkeypatch):
    fdopen = os.fdopen

    def limited(*args):
        file = fdopen(*args)

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def write(self, data):
                file.write(data[:100])
                raise OSError(28, "No space left on device")

        return Full()

    monkeypatch.setattr(store.os, "fdopen", limited)


def a_file_in_the_way(tmp_path, monkeypatch):
    (tmp_path / "kernels").write_text("")


def no_locks(tmp_path, monkeypatch):
    class Fcntl:
        LOCK_EX = 2

        def flock(self, *args):
            raise OSError(37, "No locks available")

    monkeypatch.setattr(store, "fcntl", Fcntl())


@pytest.mark.parametrize("trouble", [unwritable, full, a_file_in_the_way, no_locks], ids=lambda f: f.__name__)
def test_what_cannot_be_kept_is_made_and_said_once(tmp_path, monkeypatch, trouble):
    trouble(tmp_path, monkeypatch)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert [stored(f"k{i}", lambda: CONTENT) for i in range(3)] == [CONTENT] * 3
    assert [one.category for one in heard] == [CacheWarning]
    assert str(tmp_path / "kernels") in str(heard[0].message) and "REGNET_FAST_CACHE" in str(heard[0].message)
    assert not list(tmp_path.glob("cuda/*.tmp"))


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_costs_the_keeping(tmp_path):
    (tmp_path / "kernels").mkdir(mode=0o500)
    with pytest.warns(CacheWarning, match="Permission denied"):
        assert stored("k", lambda: CONTENT) == CONTENT


def test_a_read_only_folder_is_read(tmp_path, monkeypatch):
    stored("k", lambda: CONTENT)
    unwritable(tmp_path, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stored("k", unmade) == CONTENT


def test_where_there_are_no_locks_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "fcntl", None)
    assert stored("k", lambda: CONTENT) == CONTENT and stored("k", unmade) == CONTENT
    assert entry(tmp_path).read_bytes()[:32] == hashlib.sha256(CONTENT).digest()
