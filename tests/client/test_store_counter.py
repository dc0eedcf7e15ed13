"""Spent slots: marked before they are handed out, by one process, and never moved back."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from store_cases import check_lease, open_store, prepare

from otpipe.client.store_counter import CounterMoved, SpentCounter, new_counter
from otpipe.client.store_files import BatchDamaged
from otpipe.errors import SlotsExhausted, StoreError, StoreLocked

# --- spent before returned -----------------------------------------------------------------------


def test_slot_is_on_the_medium_before_draw_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(tmp_path) as store:
        path = prepare(store, 8)
        events: list[str] = []
        pwrite, fdatasync = os.pwrite, os.fdatasync
        monkeypatch.setattr(os, "pwrite", lambda *a: events.append("write") or pwrite(*a))
        monkeypatch.setattr(os, "fdatasync", lambda fd: events.append("sync") or fdatasync(fd))
        store.draw(3)
        events.append("returned")
        assert events == ["write", "sync", "write", "returned"]
        assert read_spent(path, 8) == 3


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_nothing_is_handed_out_when_the_disk_does_not_confirm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_store(tmp_path) as store:
        path = prepare(store, 8)
        store.draw(1)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(StoreError, match="2 slots are given up unused, check the disk"):
                store.draw(2)
        assert store.free_slots == 5
        assert store.draw(1).slot_ids == [(path.name, 3)]
    assert read_spent(path, 8) == 4


def test_own_torn_write_is_not_taken_for_somebody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    with open_store(tmp_path) as store:
        path = prepare(store, 16)
        for good_writes in (0, 1, 0, 1, 1):  # the first or the second record of a draw is torn
            left = [good_writes]

            def tear(fd: int, data: memoryview, offset: int, left: list[int] = left) -> int:
                left[0] -= 1
                if left[0] >= 0:
                    return pwrite(fd, data, offset)
                pwrite(fd, data[:30], offset)
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            with monkeypatch.context() as patch:
                patch.setattr(os, "pwrite", tear)
                with pytest.raises(StoreError, match="1 slots are given up unused"):
                    store.draw(1)
        ids = [slot for _ in range(2) for _, slot in store.draw(2).slot_ids]
        assert ids == [5, 6, 7, 8]
        assert read_spent(path, 16) == 9


def test_exhausted_store_spends_nothing(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        prepare(store, 4)
        with pytest.raises(SlotsExhausted, match="5 pad slots are needed and 4 are left"):
            store.draw(5)
        assert store.free_slots == 4


# --- counter -------------------------------------------------------------------------------------


def read_spent(batch: Path, num_slots: int) -> int:
    fd = os.open(batch / "counter.bin", os.O_RDONLY)
    try:
        return SpentCounter(fd, batch / "counter.bin", batch.name, num_slots).spent
    finally:
        os.close(fd)


@pytest.fixture
def counter_file(tmp_path: Path) -> Path:
    directory = tmp_path / ("0f" * 16)
    directory.mkdir()
    (directory / "counter.bin").write_bytes(new_counter(directory.name))
    return directory


def open_counter(batch: Path) -> SpentCounter:
    path = batch / "counter.bin"
    return SpentCounter(os.open(path, os.O_RDWR), path, batch.name, 100)


def test_torn_counter_write_never_goes_back(
    counter_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power is lost in the middle of ``advance``: what was not synced is lost, old or torn."""
    path = counter_file / "counter.bin"
    medium = bytearray(path.read_bytes())
    pending: list[tuple[int, bytes]] = []
    pwrite = os.pwrite

    def record_write(fd: int, data: memoryview, offset: int) -> int:
        pending.append((offset, bytes(data)))
        check_all_crashes()
        return pwrite(fd, data, offset)

    def sync(_: int) -> None:
        check_all_crashes()
        for offset, data in pending:
            medium[offset : offset + len(data)] = data
        pending.clear()

    acknowledged = 0

    def check_all_crashes() -> None:
        """Of the pending writes at most one is torn; the others are old or new."""
        for choice in range(3 ** len(pending)):
            state, torn = bytearray(medium), 0
            for offset, data in pending:
                choice, kind = divmod(choice, 3)
                torn += kind == 2
                kept = (0, len(data), 30)[kind]
                state[offset : offset + kept] = data[:kept]
            if torn <= 1:
                crashed = counter_file.parent / "crashed.bin"
                crashed.write_bytes(state)
                fd = os.open(crashed, os.O_RDONLY)
                found = SpentCounter(fd, crashed, counter_file.name, 100)
                assert acknowledged <= found.spent <= counter.spent
                found.close()

    counter = open_counter(counter_file)
    monkeypatch.setattr(os, "pwrite", record_write)
    monkeypatch.setattr(os, "fdatasync", sync)
    for spent in (1, 2, 5, 6, 20, 21):
        counter.advance(spent)
        acknowledged = spent
    counter.close()


@pytest.mark.parametrize("offset", [0, 4096])
def test_one_bad_record_is_survived_and_repaired(counter_file: Path, offset: int) -> None:
    path = counter_file / "counter.bin"
    for spent in (3, 4):
        counter = open_counter(counter_file)
        counter.advance(spent)
        counter.close()
        data = bytearray(path.read_bytes())
        data[offset + 33] ^= 1
        path.write_bytes(data)
        counter = open_counter(counter_file)
        assert counter.spent == spent
        counter.repair()
        counter.close()
        for other in (0, 4096):  # both are good again
            data = bytearray(path.read_bytes())
            data[other : other + 64] = bytes(64)
            copy = counter_file / "copy.bin"
            copy.write_bytes(data)
            fd = os.open(copy, os.O_RDONLY)
            assert SpentCounter(fd, copy, counter_file.name, 100).spent == spent
            os.close(fd)


def test_counter_only_grows(counter_file: Path) -> None:
    counter = open_counter(counter_file)
    counter.advance(7)
    with pytest.raises(ValueError, match="at 7 and cannot go back to 6"):
        counter.advance(6)
    counter.close()


def test_counter_of_another_batch_is_refused(counter_file: Path) -> None:
    fd = os.open(counter_file / "counter.bin", os.O_RDONLY)
    with pytest.raises(BatchDamaged, match="all of them count as spent"):
        SpentCounter(fd, counter_file, "ee" * 16, 100)
    os.close(fd)


# --- one process ---------------------------------------------------------------------------------


def test_deleted_lock_file_lets_nobody_in(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        path = prepare(store, 8)
        store.draw(2)
        writer = store.begin_batch(4)
        (store.path / "lock").unlink()
        for _ in range(2):
            with pytest.raises(
                StoreLocked, match=f"in use by process {os.getpid()}; two processes"
            ):
                open_store(tmp_path)
        assert writer.path.exists()  # what belongs to the first is left alone
        with open_store(tmp_path, exclusive=False) as reader:
            assert reader.free_slots == 6
        lease = store.draw(1)
        assert lease.slot_ids == [(path.name, 2)]
        check_lease(lease)
    with open_store(tmp_path) as store:
        assert store.draw(1).slot_ids == [(path.name, 3)]


def test_batch_in_use_is_neither_judged_nor_erased(tmp_path: Path) -> None:
    """A damaged or a spent batch in another's hands is no reason to touch it."""
    with open_store(tmp_path) as store:
        path = prepare(store, 2)
        lease = store.draw(2)
        (path / "meta.json").write_bytes(b"damaged")
        (store.path / "lock").unlink()
        with pytest.raises(StoreLocked):
            open_store(tmp_path)
        assert (path / "key.bin").exists()
        check_lease(lease)


def test_refused_open_keeps_no_locks(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        last = max(prepare(store, 4), prepare(store, 4))
    fd = os.open(last / "counter.bin", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(StoreLocked):
        open_store(tmp_path)
    os.close(fd)
    with open_store(tmp_path) as store:
        assert not store.warnings
        assert store.free_slots == 8


def move_ahead(counter: Path, batch_id: str, before: bytes) -> None:
    fd = os.open(counter, os.O_RDWR)
    other = SpentCounter(fd, counter, batch_id, 8)
    other.advance(other.spent + 1)
    other.close()


def put_back(counter: Path, batch_id: str, before: bytes) -> None:
    with counter.open("r+b") as file:
        file.write(before)


def garble_one_record(counter: Path, batch_id: str, before: bytes) -> None:
    with counter.open("r+b") as file:
        file.write(bytes(64))


def cut(counter: Path, batch_id: str, before: bytes) -> None:
    os.truncate(counter, 0)


@pytest.mark.parametrize("change", [move_ahead, put_back, garble_one_record, cut])
def test_changed_counter_ends_the_batch(
    tmp_path: Path, change: Callable[[Path, str, bytes], None]
) -> None:
    with open_store(tmp_path) as store:
        path, other = prepare(store, 8), prepare(store, 4)
        before = (path / "counter.bin").read_bytes()
        with store.draw(1):
            pass
        lease = store.draw(2)
        change(path / "counter.bin", path.name, before)
        with pytest.raises(CounterMoved, match="this process left 3: another program changed it"):
            store.draw(2)
        with pytest.raises(CounterMoved, match="this batch is not used any more"):
            lease.masks(1)
        assert f"set aside as {path.name}.damaged" in str(store.warnings[0])
        assert not (store.path / f"{path.name}.damaged" / "key.bin").exists()
        assert {info.path.name for info in store.batches} == {other.name}
        assert store.free_slots == 4
        check_lease(store.draw(3))
    with open_store(tmp_path) as store:
        assert store.draw(1).slot_ids == [(other.name, 3)]


def test_reread_counter_costs_little(counter_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = open_counter(counter_file)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    times = []
    for spent in range(1, 101):
        start = time.perf_counter()
        counter.advance(spent)
        times.append(time.perf_counter() - start)
    counter.close()
    assert sorted(times)[50] < 1e-3  # about 0.02 ms on an idle machine
