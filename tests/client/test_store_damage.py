"""Bad disks, foreign and copied batches: what is lost, what is spared, and what is said."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from store_cases import (
    FINGERPRINT,
    SHAPES,
    check_lease,
    fill,
    linear,
    open_store,
    prepare,
)

from otpipe.client import store_files, store_sync
from otpipe.client.store import PadStore, SlotDamaged, StoreFull
from otpipe.client.store_checksum import first_bad_row, position_weights, transpose_and_sum
from otpipe.client.store_layout import ModelLayout
from otpipe.errors import StoreError

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
            assert not (store.path / f"{victim.name}.damaged" / "key.bin").exists()
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


def test_key_of_a_batch_set_aside_is_overwritten_and_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overwritten: list[bytes] = []
    overwrite = store_files.overwrite

    def spy(path: Path) -> None:
        overwritten.append(path.read_bytes())
        overwrite(path)
        assert path.read_bytes() != overwritten[-1]

    monkeypatch.setattr(store_files, "overwrite", spy)
    with open_store(tmp_path) as store:
        path = prepare(store, 4)
    key = (path / "key.bin").read_bytes()
    zero(path / "checksums.bin")
    with open_store(tmp_path):
        pass
    aside = path.with_name(f"{path.name}.damaged")
    assert overwritten == [key]
    assert sorted(file.name for file in aside.iterdir()) == [
        "checksums.bin", "corrections.bin", "counter.bin", "meta.json",
    ]  # fmt: skip
    (aside / "key.bin").write_bytes(key)  # as when the machine went down before it was erased
    with open_store(tmp_path) as store:
        assert not store.warnings
    assert overwritten == [key, key]
    assert aside.exists() and not (aside / "key.bin").exists()


def test_batch_that_cannot_be_renamed_is_unusable_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_store(tmp_path) as store:
        path = prepare(store, 4)
    meta = (path / "meta.json").read_bytes()
    (path / "meta.json").write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with open_store(tmp_path) as store:
            assert store.free_slots == 0
    (path / "meta.json").write_bytes(meta)
    with open_store(tmp_path) as store:
        assert store.free_slots == 0
        assert "key.bin is missing" in str(store.warnings[0])


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
    (path / "counter.bin").unlink()  # another format need not have one
    with open_store(tmp_path) as store:
        assert "has store format 7" in str(store.warnings[0])
    assert (path / "key.bin").exists()


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


def test_failing_early_sync_fails_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed write-back is reported once, and then not to the synchronisation at the end."""
    fsync, failed = os.fsync, threading.Event()

    def fail_in_the_background(fd: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    monkeypatch.setattr(store_sync, "PERIOD_BYTES", 100)
    with open_store(tmp_path) as store:
        with store.begin_batch(4) as writer:
            monkeypatch.setattr(os, "fsync", fail_in_the_background)
            fill(writer)
            assert failed.wait(5)
            with pytest.raises(StoreError, match="cannot commit"):
                writer.commit()
            monkeypatch.undo()
        assert store.free_slots == 0


def test_unusable_root(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot open the pad store"):
        open_store(tmp_path / "file")
