"""The pad store under ``kill -9``: no slot is ever handed out twice, nothing usable is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from store_cases import FINGERPRINT, SHAPES, check_lease, fill, open_store, prepare

from otpipe.client.store import PadStore, StoreFull
from otpipe.errors import StoreLocked

Child = Callable[[Path, Callable[[str], None]], None]


class Process:
    """A fork that runs ``work(root, say)``; what it says arrives even if it is killed right after.

    A fork is killed like any process, and starts without importing everything again. It opens the
    store itself.
    """

    def __init__(self, work: Child, root: Path) -> None:
        read_fd, write_fd = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(read_fd)
                work(root, lambda line: os.write(write_fd, f"{line}\n".encode()) and None)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(write_fd)
        self._pipe = os.fdopen(read_fd)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> tuple[int, list[str]]:
        """(exit status, negative for a signal; lines said)."""
        lines = self._pipe.read().splitlines()
        self._pipe.close()
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), lines

    def wait_for_line(self) -> str:
        return self._pipe.readline().strip()


def draw_until_killed(root: Path, say: Callable[[str], None]) -> None:
    generator = np.random.default_rng(os.getpid())
    with open_store(root) as store:
        assert not store.warnings, store.warnings
        say("ready")
        while True:
            count = min(int(generator.integers(1, 4)), store.free_slots)
            with store.draw(count) as lease:
                for batch, slot in lease.slot_ids:
                    say(f"{batch} {slot}")
                lease.masks(1)


def test_killed_draws_never_repeat_a_slot(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        for _ in range(2):
            prepare(store, 2048)
    generator = np.random.default_rng(20)
    seen: list[str] = []
    for _ in range(24):
        child = Process(draw_until_killed, tmp_path)
        assert child.wait_for_line() == "ready"
        time.sleep(generator.uniform(0, 0.04))
        child.kill()
        status, lines = child.wait()
        assert status == -signal.SIGKILL
        seen += lines
        with open_store(tmp_path) as store:
            if store.free_slots < 2048:  # more than one child can draw
                prepare(store, 2048)
    assert len(seen) > 24
    assert len(set(seen)) == len(seen)


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """End this process with SIGKILL just before its ``step``-th call that changes the disk."""
    left = [step]
    names = (
        "pwrite", "fdatasync", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir",
        "posix_fallocate", "open",
    )  # fmt: skip
    originals = {name: getattr(os, name) for name in names}

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        return call

    for name, original in originals.items():
        setattr(os, name, counted(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def kill_at_every_step(root: Path, work: Child) -> Iterator[tuple[int, list[str]]]:
    """Run ``work`` in forks that die at the first, second, ... step until one gets through."""
    for step in range(200):

        def child(path: Path, say: Callable[[str], None], step: int = step) -> None:
            with killed_at(step):
                work(path, say)

        status, lines = Process(child, root).wait()
        assert status in (0, -signal.SIGKILL)
        yield status, lines
        if status == 0:
            return
    raise AssertionError("the work never gets through")


def draw_two(root: Path, say: Callable[[str], None]) -> None:
    with open_store(root) as store:
        assert not store.warnings, store.warnings
        for _ in range(2):
            for batch, slot in store.draw(1).slot_ids:
                say(f"{batch} {slot}")


def test_killed_at_every_step_of_a_draw(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        prepare(store, 1024)
    seen = [line for _, lines in kill_at_every_step(tmp_path, draw_two) for line in lines]
    assert len(seen) > 2
    assert len(set(seen)) == len(seen)


def commit_one(root: Path, say: Callable[[str], None]) -> None:
    with open_store(root) as store:
        assert not store.warnings, store.warnings
        writer = store.begin_batch(4)
        fill(writer)
        say("filled")
        writer.commit()
        say("committed")


def test_killed_at_every_step_of_a_preparation(tmp_path: Path) -> None:
    """A batch is there completely or not at all, and left-overs are cleaned up."""
    outcomes = set()
    for status, lines in kill_at_every_step(tmp_path, commit_one):
        with open_store(tmp_path) as store:
            assert not store.warnings
            assert store.free_slots in (0, 4)
            if "committed" in lines:
                assert store.free_slots == 4
            outcomes.add((status, store.free_slots))
            names = {path.name for path in store.path.iterdir() if path.is_dir()}
            assert len(names) == store.free_slots // 4
            if store.free_slots:
                check_lease(store.draw(4))
        assert not [path for path in (tmp_path / FINGERPRINT).iterdir() if path.is_dir()]
    assert {(-signal.SIGKILL, 0), (-signal.SIGKILL, 4), (0, 4)} <= outcomes


def spend_all(root: Path, say: Callable[[str], None]) -> None:
    with open_store(root) as store:
        assert not store.warnings, store.warnings
        while store.free_slots:
            with store.draw(1) as lease:
                say(" ".join(map(str, lease.slot_ids[0])))


def test_killed_at_every_step_of_erasing(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        prepare(store, 1)
    seen: list[str] = []
    for status, lines in kill_at_every_step(tmp_path, spend_all):
        seen += lines
        left = [info.state for info in PadStore.inspect(tmp_path)]
        assert set(left) <= {"ready", "spent"}
        if status == 0:
            assert not left
        if not lines and not left:  # erased by an earlier run: go on with the next batch
            with open_store(tmp_path) as store:
                prepare(store, 1)
    assert len(set(seen)) == len(seen)


def prepare_until_killed(root: Path, say: Callable[[str], None]) -> None:
    with open_store(root) as store:
        say("ready")
        while True:
            say(prepare(store, 2).name)


def test_killed_preparations_leave_only_whole_batches(tmp_path: Path) -> None:
    generator = np.random.default_rng(21)
    for _ in range(10):
        child = Process(prepare_until_killed, tmp_path)
        assert child.wait_for_line() == "ready"
        time.sleep(generator.uniform(0, 0.05))
        child.kill()
        _, committed = child.wait()
        with open_store(tmp_path) as store:
            assert not store.warnings
            names = {info.path.name for info in store.batches}
            assert set(committed) <= names and len(names) <= len(committed) + 1
            for _ in range(len(names)):
                check_lease(store.draw(2))


def hold(root: Path, say: Callable[[str], None]) -> None:
    with open_store(root):
        say("ready")
        time.sleep(60)


def test_second_process_is_locked_out_until_the_first_dies(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        prepare(store, 4)
    child = Process(hold, tmp_path)
    assert child.wait_for_line() == "ready"
    with pytest.raises(StoreLocked) as caught:
        open_store(tmp_path)
    for part in (f"process {child.pid}", str(tmp_path / FINGERPRINT), "end that process"):
        assert part in str(caught.value)
    child.kill()
    child.wait()
    with open_store(tmp_path) as store:
        assert store.free_slots == 4


def hold_and_draw(root: Path, say: Callable[[str], None]) -> None:
    with open_store(root) as store:
        say("ready")
        while store.free_slots > 1:
            (slot,) = store.draw(1).slot_ids
            say(f"{slot[0]} {slot[1]}")
            time.sleep(0.002)
        time.sleep(60)


def test_second_process_is_locked_out_although_the_lock_file_was_deleted(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        prepare(store, 64)
    child = Process(hold_and_draw, tmp_path)
    assert child.wait_for_line() == "ready"
    for _ in range(8):
        (tmp_path / FINGERPRINT / "lock").unlink(missing_ok=True)
        with pytest.raises(StoreLocked, match=f"in use by process {child.pid}"):
            open_store(tmp_path)
    child.kill()
    _, seen = child.wait()
    with open_store(tmp_path) as store:
        assert not store.warnings
        left = [f"{batch} {slot}" for batch, slot in store.draw(store.free_slots).slot_ids]
    assert left and not set(left) & set(seen)
    assert len(set(seen)) == len(seen)


def test_file_size_limit_is_reported_as_a_full_store(tmp_path: Path) -> None:
    def work(root: Path, say: Callable[[str], None]) -> None:
        import resource

        with open_store(root) as store:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            try:
                store.begin_batch(1024)
            except StoreFull as error:
                say(str(error))
            assert not list(store.path.glob("*.partial"))

    status, lines = Process(work, tmp_path).wait()
    assert status == 0
    assert "a batch of 1024 slots needs" in lines[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 4 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "otpipe-test", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs")
def test_full_disk(small_disk: Path) -> None:
    per_slot = sum(shape.correction_bytes for shape in SHAPES)
    with open_store(small_disk) as store:
        prepare(store, 1024)
        filler = small_disk / "filler"
        filler.write_bytes(bytes(3 << 20))
        with pytest.raises(StoreFull, match="are available; free some space"):
            store.begin_batch(2048)
        check_lease(store.draw(2))
        filler.unlink()
        prepare(store, 2048)
        assert store.free_slots == 3070
        assert store.batch_bytes(2048) >= 2048 * per_slot
