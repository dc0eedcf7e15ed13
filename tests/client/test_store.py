"""The pad store: what it hands out, what it refuses, and what it says about it."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from store_cases import (
    BY_INDEX,
    FINGERPRINT,
    SHAPES,
    check_lease,
    fill,
    linear,
    open_store,
    prepare,
)

from otpipe.client import store_files, store_pads, store_writer
from otpipe.client.store import MapShape, PadReuseError, PadStore, SlotDamaged, StoreFull
from otpipe.client.store_checksum import first_bad_row, position_weights, transpose_and_sum
from otpipe.client.store_files import BatchDamaged, SpentCounter, new_counter
from otpipe.client.store_layout import ModelLayout
from otpipe.crypto.randomness import derive_key, keystream
from otpipe.errors import SlotsExhausted, StoreError, StoreLocked

# --- pads and corrections ------------------------------------------------------------------------


def test_corrections_belong_to_masks(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        assert store.free_slots == 0
        prepare(store, 8)
        assert store.free_slots == 8
        with store.draw(1) as lease:
            check_lease(lease)
        with store.draw(5) as lease:
            check_lease(lease)
        assert store.free_slots == 2
        (info,) = store.batches
        assert (info.slots_total, info.slots_spent, info.slots_free) == (8, 6, 2)


def test_batch_survives_reopening_and_goes_on_at_the_right_slot(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        path = prepare(store, 8)
        assert store.draw(3).slot_ids == [(path.name, i) for i in range(3)]
    with open_store(tmp_path) as store:
        assert not store.warnings
        lease = store.draw(2)
        assert lease.slot_ids == [(path.name, 3), (path.name, 4)]
        check_lease(lease)


def test_pads_of_slots_and_batches_differ(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        prepare(store, 4)
        prepare(store, 4)
        rows = store.draw(8).masks(1)
        assert len(np.unique(rows)) > 0.9 * rows.size


def test_lease_spans_batches_oldest_first(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        first, second = prepare(store, 4), prepare(store, 8)
        lease = store.draw(7)
        assert [name for name, _ in lease.slot_ids] == [first.name] * 4 + [second.name] * 3
        mask_2n = lease.masks(1, [5, 2])
        correction_2m = lease.corrections(1, slice(2, 6))[[3, 0]]
        np.testing.assert_array_equal(correction_2m, linear(BY_INDEX[1], mask_2n))


def test_rows_can_be_taken_in_parts(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        prepare(store, 8)
        lease = store.draw(6)
        parts = [lease.masks(0, slice(0, 2)), lease.masks(0, [4, 5]), lease.masks(0, slice(2, 4))]
        r_6n = np.concatenate([parts[0], parts[2], parts[1]])
        np.testing.assert_array_equal(lease.corrections(0), linear(BY_INDEX[0], r_6n))
        assert lease.masks(0, slice(3, 3)).shape == (0, 37)


def test_windows_do_not_change_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles of pads and corrections; blocks that cross them, in any order."""
    monkeypatch.setattr(store_pads, "_WINDOW_BYTES", 8 * 16)
    monkeypatch.setattr(store_writer, "_WINDOW_BYTES", 8 * 4 * 7)
    with open_store(tmp_path) as store:
        with store.begin_batch(8) as writer:
            for shape in SHAPES:
                whole = writer.pads(shape.index, 0, shape.in_features)
                for first, count in ((3, 4), (5, 1), (0, 6), (2, 5)):
                    block = writer.pads(shape.index, first, count)
                    np.testing.assert_array_equal(block, whole[:, first : first + count])
                c_mT = linear(shape, whole).T
                edges = [0, 1, 2, 19, shape.out_features] if shape.out_features > 19 else [0, 1, 3]
                spans = list(itertools.pairwise(edges))
                for first, stop in spans[::2] + spans[1::2]:
                    writer.put(shape.index, first, c_mT[first:stop])
            writer.commit()
        check_lease(store.draw(8))


def test_short_and_long_requests_see_one_keystream() -> None:
    key, shape = bytes(range(32)), MapShape(3, 50, 1, 4)  # stride 208
    stream = store_pads.PadStream(key, shape)
    reference = np.empty(2048 * 208, np.uint8)
    keystream(derive_key(key, "pad", 3), 0, 0, reference)
    wanted = reference.reshape(2048, 208)[:, :200].copy().view("<u4")
    np.testing.assert_array_equal(stream.rows(0, 2048), wanted)
    for first, count in ((0, 1), (7, 1), (300, 10), (1, 400)):
        np.testing.assert_array_equal(stream.rows(first, count), wanted[first : first + count])


def test_a_map_can_start_over_after_a_lost_connection(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        with store.begin_batch(4) as writer:
            writer.put(1, 0, np.ones((20, 4), np.uint32))  # answers cut off here
            fill(writer)  # all maps, from output 0
            writer.commit()
        check_lease(store.draw(4))


def test_threads_draw_different_slots(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        prepare(store, 64)
        taken: list[tuple[str, int]] = []

        def work() -> None:
            for _ in range(8):
                with store.draw(2) as lease:
                    taken.extend(lease.slot_ids)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(taken)) == len(taken) == 64


def test_drawing_goes_on_while_a_batch_is_prepared(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        prepare(store, 4)
        with store.begin_batch(4) as writer:
            fill(writer)
            check_lease(store.draw(2))
            writer.commit()
        assert store.free_slots == 6


# --- misuse --------------------------------------------------------------------------------------


def test_mask_is_given_out_once(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        prepare(store, 4)
        lease = store.draw(3)
        lease.masks(1, slice(0, 2))
        with pytest.raises(PadReuseError, match=r"mask of map 1, row 1 was already given out"):
            lease.masks(1, [2, 1])
        lease.masks(1, [2])  # the refused call took nothing
        with pytest.raises(PadReuseError, match="row 0"):
            lease.masks(0, [0, 0])
        lease.corrections(5)
        with pytest.raises(PadReuseError, match="correction of map 5, row 0"):
            lease.corrections(5, slice(0, 1))


def test_bad_arguments(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        prepare(store, 4)
        lease = store.draw(2)
        for rows in ([2], [-1], slice(0, 3), slice(0, 2, 2), slice(-1, None)):
            with pytest.raises(ValueError, match="of a lease of 2"):
                lease.masks(1, rows)
        with pytest.raises(ValueError, match="no map 3"):
            lease.masks(3)
        with pytest.raises(ValueError, match="draw of 0"):
            store.draw(0)
        for num_slots in (0, 3, 4096):
            with pytest.raises(ValueError, match="power of two up to 2048"):
                store.begin_batch(num_slots)
    with pytest.raises(ValueError, match="64 lower-case hex digits"):
        PadStore.open(tmp_path, "../" + FINGERPRINT, SHAPES)
    with pytest.raises(ValueError, match="same index"):
        PadStore.open(tmp_path, FINGERPRINT, (SHAPES[0], SHAPES[0]))
    with pytest.raises(ValueError, match="use 1 or 4"):
        MapShape(0, 1, 1, 8)


def test_closed_and_forked_objects_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    prepare(store, 4)
    lease, open_lease = store.draw(1), store.draw(1)
    lease.close()
    with pytest.raises(RuntimeError, match="lease is closed"):
        lease.masks(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(StoreError, match="in its fork -1; open it in the process that draws"):
            store.draw(1)
        with pytest.raises(PadReuseError, match="forked process"):
            open_lease.masks(1)
    store.close()
    store.close()
    with pytest.raises(RuntimeError, match="lease is closed"):
        open_lease.masks(1)
    with pytest.raises(RuntimeError, match="store is closed"):
        store.draw(1)


def test_secrets_are_neither_pickled_nor_printed(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        path = prepare(store, 4)
        key = store_files.read_key(path / "key.bin", path.name)
        lease = store.draw(1)
        with store.begin_batch(4) as writer:
            for secret in (store, lease, writer):
                with pytest.raises(TypeError, match="never pickled"):
                    pickle.dumps(secret)
                assert key.hex() not in repr(vars(secret)) and str(key) not in repr(vars(secret))


def test_writer_refuses_wrong_puts(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, store.begin_batch(4) as writer:
        c = np.zeros((10, 4), np.uint32)
        with pytest.raises(ValueError, match=r"int64 \(10, 4\); wanted uint32 \(rows, 4\)"):
            writer.put(1, 0, c.astype(np.int64))
        with pytest.raises(ValueError, match=r"wanted uint32 \(rows, 4\)"):
            writer.put(1, 0, c.T)
        with pytest.raises(ValueError, match=r"outputs 45\.\.55 of map 1, which has 50"):
            writer.put(1, 45, c)
        writer.put(1, 20, c)
        with pytest.raises(ValueError, match="put twice"):
            writer.put(1, 25, c)
        with pytest.raises(ValueError, match=r"coordinates 20\.\.30 of map 1, which has 24"):
            writer.pads(1, 20, 10)
        with pytest.raises(ValueError, match="commit with 0 of 21 outputs of map 0"):
            writer.commit()
        writer.abort()
        with pytest.raises(RuntimeError, match="batch is aborted"):
            writer.pads(1, 0, 1)
        with pytest.raises(RuntimeError, match="batch is aborted"):
            writer.commit()


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


# --- damage --------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def spoil(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1) or b"\0"
        file.seek(offset)
        file.write(bytes([byte[0] ^ 4]))


def flip(path: Path) -> None:
    size = path.stat().st_size
    for offset in (size // 32, size // 2, size - 1):
        spoil(path, offset)


def zero(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [truncate, flip, zero, empty, Path.unlink])
@pytest.mark.parametrize(
    "name", ["meta.json", "key.bin", "counter.bin", "corrections.bin", "checksums.bin"]
)
def test_damaged_file_costs_one_batch_only(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    with open_store(tmp_path) as store:
        victim, other = prepare(store, 4), prepare(store, 4)
        store.draw(1)
    damage(victim / name)
    if name == "counter.bin" and damage in (truncate, flip):
        for offset in (0, 4096):  # one bad record alone would be repaired
            spoil(victim / name, offset + 30)
    with open_store(tmp_path) as store:
        if store.warnings:
            (warning,) = store.warnings
            assert name in str(warning)
            assert f"set aside as {victim.name}.damaged" in str(warning)
            assert store.free_slots == 4
            assert not victim.exists()
        else:  # damage that only single rows can show
            assert name in ("corrections.bin", "checksums.bin")
            with pytest.raises(SlotDamaged, match="the other slots stay usable"):
                for _ in range(3):
                    check_lease(store.draw(1))
            store.draw(store.free_slots - 4)
        lease = store.draw(4)
        assert {batch for batch, _ in lease.slot_ids} == {other.name}
        check_lease(lease)
    infos = {info.path.name: info for info in PadStore.inspect(tmp_path)}
    if f"{victim.name}.damaged" in infos:
        assert infos[f"{victim.name}.damaged"].slots_free == 0
    with open_store(tmp_path) as store:  # nothing is said twice
        assert not store.warnings


def test_damaged_row_names_itself_and_spares_the_others(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        path = prepare(store, 8)
        shape, position = SHAPES[1], 1
        offset = ModelLayout(FINGERPRINT, SHAPES).region_offsets(8)[position]
        spoil(path / "corrections.bin", offset + 5 * shape.correction_bytes + 17)
        store.draw(2)
        lease = store.draw(5)
        with pytest.raises(SlotDamaged, match=r"slot 5, map 1 in .*corrections\.bin") as caught:
            lease.corrections(1, slice(1, 5))
        assert caught.value.row == 3
        rows = [0, 1, 2, 4]
        r_4n = lease.masks(1, rows)
        np.testing.assert_array_equal(lease.corrections(1, rows), linear(shape, r_4n))


def test_unreadable_disk_block_is_an_error_and_not_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_store(tmp_path) as store:
        path = prepare(store, 4)
        lease = store.draw(1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            with pytest.raises(SlotDamaged, match="Input/output error"):
                lease.corrections(1)
        empty(path / "corrections.bin")  # while it is open
        with pytest.raises(SlotDamaged, match="the file ends early"):
            lease.corrections(1)


def test_checksum_notices_exchanged_words_and_rows() -> None:
    rng = np.random.default_rng(1)
    source = rng.integers(0, 2**32, (70, 24), dtype=np.uint32)
    weights, sums = position_weights(70), np.zeros(24, np.uint64)
    target = np.zeros((24, 75), np.uint32)
    transpose_and_sum(source[:33], target, 5, weights[:33], sums)
    transpose_and_sum(source[33:], target, 38, weights[33:], sums)
    rows = np.ascontiguousarray(target[:, 5:])
    np.testing.assert_array_equal(rows, source.T)
    exact = [
        sum(int(w) * int(x) for w, x in zip(weights, row, strict=True)) % 2**64 for row in rows
    ]
    assert sums.tolist() == exact
    assert first_bad_row(rows, weights, sums) == -1
    rows[7, [3, 4]] = rows[7, [4, 3]]
    assert first_bad_row(rows, weights, sums) == 7
    rows[7, [3, 4]] = rows[7, [4, 3]]
    rows[[2, 3]] = rows[[3, 2]]
    assert first_bad_row(rows, weights, sums) == 2
    assert (position_weights(2048) % 2 == 1).all()
    assert len(np.unique(position_weights(2048))) == 2048


# --- foreign batches -----------------------------------------------------------------------------


def test_other_fingerprint_has_its_own_slots(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        prepare(store, 4)
    with open_store(tmp_path, "cd" * 32) as other:
        assert other.free_slots == 0 and not other.warnings
        prepare(other, 8)
        with open_store(tmp_path) as store:  # models do not lock each other
            assert store.free_slots == 4
    assert sorted(info.slots_free for info in PadStore.inspect(tmp_path)) == [4, 8]


def test_batch_in_the_wrong_model_is_left_alone(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        path = prepare(store, 4)
    other_dir = tmp_path / ("cd" * 32)
    with open_store(tmp_path, "cd" * 32) as other:
        path.rename(other_dir / path.name)
        prepare(other, 2)
    with open_store(tmp_path, "cd" * 32) as other:
        (warning,) = other.warnings
        assert f"prepared for the model {FINGERPRINT}" in str(warning)
        assert other.free_slots == 2
    (other_dir / path.name).rename(path)
    with open_store(tmp_path) as store:  # a move within the file system is harmless
        assert store.free_slots == 4


def test_other_shapes_under_one_fingerprint_are_refused(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        prepare(store, 4)
    with PadStore.open(tmp_path, FINGERPRINT, SHAPES[:2]) as store:
        assert store.free_slots == 0
        assert "its 3 maps, not for" in str(store.warnings[0])


def test_other_format_version_is_left_alone(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        path = prepare(store, 4)
    meta = json.loads((path / "meta.json").read_bytes())
    (path / "meta.json").write_text(json.dumps(meta | {"version": 7, "digest": "new"}))
    heard: list[StoreError] = []
    with PadStore.open(tmp_path, FINGERPRINT, SHAPES, on_warning=heard.append) as store:
        assert store.free_slots == 0
        assert heard == store.warnings
        assert "has store format 7 and this otpipe reads format 1" in str(heard[0])
    assert path.exists()


def test_copied_store_is_refused(tmp_path: Path) -> None:
    with open_store(tmp_path / "a") as store:
        path = prepare(store, 4)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with open_store(tmp_path / "b") as copy:
        assert copy.free_slots == 0
        assert "is a copy or a restored backup" in str(copy.warnings[0])
    (info,) = PadStore.inspect(tmp_path / "b")
    assert info.state == "unusable" and "restored backup" in info.problem
    backup = tmp_path / "backup"
    shutil.copytree(path, backup)
    with open_store(tmp_path / "a") as store:
        store.draw(2)
    shutil.rmtree(path)
    shutil.copytree(backup, path)
    with open_store(tmp_path / "a") as store:
        assert store.free_slots == 0 and "restored backup" in str(store.warnings[0])


def test_other_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path) as store:
        prepare(store, 4)
    monkeypatch.setattr(store_files, "_machine_tag", lambda: "another machine")
    with open_store(tmp_path) as store:
        assert store.free_slots == 0 and "prepared elsewhere" in str(store.warnings[0])


# --- disk ----------------------------------------------------------------------------------------


def test_modes_are_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        root = tmp_path / "data" / "pads"
        with open_store(root) as store:
            prepare(store, 4)
            with store.begin_batch(2):
                modes = {path: path.stat().st_mode for path in [root, *root.rglob("*")]}
    finally:
        os.umask(old)
    assert len(modes) > 10
    for path, mode in modes.items():
        assert mode & 0o777 == (0o700 if stat.S_ISDIR(mode) else 0o600), path


def test_open_store_directory_is_closed_to_others(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        prepare(store, 4)
    (tmp_path / FINGERPRINT).chmod(0o755)
    with open_store(tmp_path) as store:
        assert "had mode 0755" in str(store.warnings[0])
        assert store.free_slots == 4
    assert (tmp_path / FINGERPRINT).stat().st_mode & 0o777 == 0o700


def test_too_small_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(tmp_path) as store:
        monkeypatch.setattr(store_files, "free_bytes", lambda _: 12345)
        with pytest.raises(StoreFull, match=r"needs \d+ bytes in .* and 12345 are available"):
            store.begin_batch(4)
        assert not list(store.path.glob("*.partial"))


def test_disk_that_fills_up_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_store(tmp_path) as store:
        prepare(store, 4)
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(StoreFull, match="free some space"):
                store.begin_batch(4)
        assert not list(store.path.glob("*.partial"))
        writer = store.begin_batch(4)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(StoreFull, match="free some space"):
                fill(writer)
        with pytest.raises(RuntimeError, match="batch is failed"):
            writer.commit()
        writer.abort()
        assert not list(store.path.glob("*.partial"))
        assert store.free_slots == 4
        prepare(store, 4)


def test_failing_sync_fails_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_store(tmp_path) as store:
        with store.begin_batch(4) as writer:
            fill(writer)
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", fail)
                with pytest.raises(StoreError, match="cannot commit"):
                    writer.commit()
        assert store.free_slots == 0
        assert not [path for path in store.path.iterdir() if path.is_dir()]


def test_unusable_root(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot open the pad store"):
        open_store(tmp_path / "file")


# --- life cycle ----------------------------------------------------------------------------------


def test_spent_batch_is_erased_when_its_leases_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overwritten: list[bytes] = []
    overwrite = store_files.overwrite

    def spy(path: Path) -> None:
        before = path.read_bytes()
        overwrite(path)
        assert path.read_bytes() != before
        overwritten.append(before)

    monkeypatch.setattr(store_files, "overwrite", spy)
    with open_store(tmp_path) as store:
        path = prepare(store, 2)
        key_file = (path / "key.bin").read_bytes()
        lease = store.draw(2)
        prepare(store, 2)
        store.draw(1)
        assert path.exists()
        check_lease(lease)
        lease.close()
        assert not path.exists()
        assert overwritten == [key_file]
        assert store.free_slots == 1


def test_dropped_lease_frees_the_batch_at_the_next_draw(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        path = prepare(store, 2)
        prepare(store, 2)
        store.draw(2)
        store.draw(1)
        assert not path.exists()


def test_spent_batch_is_erased_at_close_and_open(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        path = prepare(store, 2)
        lease = store.draw(2)
        assert path.exists()
    assert not path.exists() and lease.count == 2
    for suffix in (".partial", ".spent"):
        left_over = tmp_path / FINGERPRINT / ("11" * 16 + suffix)
        left_over.mkdir()
        (left_over / "key.bin").write_bytes(b"x" * 72)
    foreign = tmp_path / FINGERPRINT / "notes.partial"
    foreign.write_text("not ours")
    with open_store(tmp_path) as store:
        assert not store.warnings
    assert [p.name for p in (tmp_path / FINGERPRINT).glob("*.*")] == ["holder.json", foreign.name]


def test_closing_aborts_a_preparation(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        writer = store.begin_batch(4)
    assert not writer.path.exists()
    with pytest.raises(RuntimeError, match="aborted"):
        writer.put(1, 0, np.zeros((1, 4), np.uint32))


def test_inspect_sees_everything_without_the_lock(tmp_path: Path) -> None:
    assert PadStore.inspect(tmp_path / "none") == []
    with open_store(tmp_path) as store:
        prepare(store, 8)
        store.draw(3)
        writer = store.begin_batch(4)
        infos = {info.state: info for info in PadStore.inspect(tmp_path)}
        assert set(infos) == {"ready", "partial"}
        assert infos["ready"].slots_total == 8
        assert (infos["ready"].slots_spent, infos["ready"].slots_free) == (3, 5)
        assert infos["ready"].fingerprint == FINGERPRINT
        assert infos["ready"].num_bytes > 0 and 0 <= infos["ready"].age_s < 60
        assert infos["partial"].slots_free == 0
        writer.abort()


def test_looking_only_changes_nothing(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        prepare(store, 4)
        writer = store.begin_batch(4)
        with open_store(tmp_path, exclusive=False) as reader:
            assert reader.free_slots == 4
            with pytest.raises(StoreError, match="opened for looking only"):
                reader.draw(1)
            with pytest.raises(StoreError, match="opened for looking only"):
                reader.begin_batch(4)
        assert writer.path.exists()
        assert store.free_slots == 4


def test_second_store_in_the_same_process_is_locked_out(tmp_path: Path) -> None:
    with open_store(tmp_path), pytest.raises(StoreLocked, match=f"in use by process {os.getpid()}"):
        open_store(tmp_path)
    open_store(tmp_path).close()
