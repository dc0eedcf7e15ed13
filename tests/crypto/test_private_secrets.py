"""Masks: one value per slot and output however they are read, used once. Fresh randomness."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from crypto_helpers import chi_square_z, has_fresh_error
from private_helpers import INSECURE, PRIVATE44, drawn
from torch import from_numpy

from otpipe.crypto.private_params import PrivatePacking
from otpipe.crypto.private_secrets import MaskReused, MaskStream, fresh_mask_key

KEY = bytes(range(32))
KNOWN_ANSWER = [12525008967722, 15336716386355, 13449257463833]


class TestMasks:
    @pytest.mark.parametrize("num_outputs", [1, 8, 13])
    def test_rows_and_tiles_agree(self, num_outputs: int) -> None:
        masks = MaskStream(KEY, 3, num_outputs, 44)
        rows = masks.rows(0, 20)
        assert rows.shape == (20, num_outputs) and rows.dtype == np.int64
        assert rows.min() >= 0 and rows.max() < 1 << 44
        assert np.array_equal(masks.rows(7, 4), rows[7:11])
        packing = PrivatePacking(INSECURE, 16, 2)  # 2 outputs an answer
        for first in range(packing.num_answers(num_outputs)):
            tiles = np.full((packing.num_answers(num_outputs) - first, 2, 16), -1)
            masks.tiles(first, packing, tiles)
            want = rows[:16, 2 * first :].T
            assert np.array_equal(tiles.reshape(-1, 16)[: len(want)], want)
            assert not tiles.reshape(-1, 16)[len(want) :].any()

    def test_known_answer(self) -> None:
        """Pinned: a change would make every mask that a server can derive again another one."""
        assert MaskStream(KEY, 3, 3, 44).rows(1, 1)[0].tolist() == KNOWN_ANSWER

    def test_tiles_of_answers_are_padded_with_zeros(self) -> None:
        packing = PrivatePacking(INSECURE, 8, 2)  # 4 outputs an answer
        masks = MaskStream(KEY, 3, 10, 44)
        tiles = np.full((2, 4, 8), -1)
        masks.tiles(1, packing, tiles)
        assert np.array_equal(tiles.reshape(8, 8)[:6], masks.rows(0, 8).T[4:10])
        assert not tiles.reshape(8, 8)[6:].any()

    def test_keys_and_maps_have_their_own(self) -> None:
        first = MaskStream(KEY, 3, 4, 44).rows(0, 1)
        assert not np.array_equal(first, MaskStream(KEY, 4, 4, 44).rows(0, 1))
        assert not np.array_equal(first, MaskStream(fresh_mask_key(), 3, 4, 44).rows(0, 1))

    def test_uniform(self) -> None:
        masks = MaskStream(fresh_mask_key(), 0, 64, 44).rows(0, 1024)
        octets = masks.copy().view(np.uint8).reshape(-1, 8)
        assert all(abs(chi_square_z(octets[:, i])) < 6 for i in range(5))
        assert octets[:, 5].max() == 15 and not octets[:, 6:].any()

    def test_one_exchange_per_key(self) -> None:
        masks = MaskStream(KEY, 3, 4, 44)
        masks.spend()
        with pytest.raises(MaskReused, match="draw a fresh mask key"):
            masks.spend()

    def test_not_printed_pickled_or_copied(self) -> None:
        masks = MaskStream(KEY, 3, 4, 44)
        assert repr(masks) == "MaskStream(4 outputs, hidden)"
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="never pickled"):
                attempt(masks)


class TestAnswerSecrets:
    def test_shapes_and_laws(self) -> None:
        packing = PrivatePacking(PRIVATE44, 1024, 2)
        secrets = drawn(9, packing)
        assert secrets.ternary.shape == secrets.error.shape == (9, 8192)
        assert secrets.flood.shape == (9, 3, 4096)
        counts = np.bincount(secrets.ternary.reshape(-1) + 1, minlength=3)
        assert counts.size == 3 and abs(counts - counts.sum() / 3).max() < 6 * np.sqrt(9 * 8192)
        assert has_fresh_error(from_numpy(secrets.error), PRIVATE44.error_eta)
        octets = secrets.flood.copy().view(np.uint8).reshape(-1, 8)
        assert all(abs(chi_square_z(octets[:, i])) < 6 for i in range(8))

    def test_no_row_repeats(self) -> None:
        packing = PrivatePacking(PRIVATE44, 1024, 2)
        draws = [drawn(4, packing) for _ in range(3)]
        for field in ("ternary", "error", "flood"):
            rows = [row.tobytes() for draw in draws for row in getattr(draw, field)]
            assert len(set(rows)) == 12
        words = np.concatenate([draw.flood.reshape(-1) for draw in draws])
        assert np.unique(words).size == words.size
