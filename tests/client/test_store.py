"""The pad store: what it hands out, what it refuses, and how it begins and ends."""

from __future__ import annotations

import itertools
import os
import pickle
import threading
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
from otpipe.client.store import MapShape, PadReuseError, PadStore
from otpipe.crypto.randomness import derive_key, keystream
from otpipe.errors import StoreError, StoreLocked

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
    """Blocks of pads that begin anywhere; corrections that cross small windows, in any order."""
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
    with pytest.raises(ValueError, match="use 1, 4 or 8"):
        MapShape(0, 1, 1, 2)


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
