"""End to end: W r exactly. What the server sees: uniform. What must not happen: refused."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from crypto_helpers import (
    MAP_INDEX,
    exchange,
    has_fresh_error,
    look_alike,
    looks_uniform,
    random_pads,
    residual,
    signed,
    times_secret,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from otpipe.crypto import rlwe
from otpipe.crypto.params import RLWE_PARAMS
from otpipe.crypto.randomness import centered_binomial
from otpipe.crypto.rlwe import (
    BatchSecret,
    SecretReused,
    decrypt_block,
    encrypt_block,
    expand_a,
    fill_a,
)
from otpipe.errors import ParameterError, ProtocolError
from otpipe.kernels import combine_planes, unpack_uints

RING32, RING8 = RLWE_PARAMS["ring32"], RLWE_PARAMS["ring8"]
WIDTHS = [("ring32", 6), ("ring32", 7), ("ring8", 4)]


class TestEndToEnd:
    @pytest.mark.parametrize("name", RLWE_PARAMS)
    @pytest.mark.parametrize(
        ("m", "n", "num_slots"),
        [(13, 7, 2048), (7, 13, 2048), (33, 5, 256), (5, 33, 256), (1, 1, 2048), (71, 70, 64)],
    )
    def test_every_output_is_exact(self, name: str, m: int, n: int, num_slots: int) -> None:
        weight = torch.randint(-127, 128, (m, n), dtype=torch.int8)
        done = exchange(RLWE_PARAMS[name], weight, num_slots, block_size=9, max_bytes=1 << 16)
        assert done.got.shape == (m, num_slots)
        assert done.got.dtype == done.secret.params.message_dtype
        assert np.array_equal(done.got, done.want)

    def test_unrounded_upload(self) -> None:
        """A packed map of large weights needs all of q."""
        weight = torch.full((64, 300), 127, dtype=torch.int8)
        done = exchange(RING32, weight, 64)
        assert done.upload_bytes == 7
        assert np.array_equal(done.got, done.want)

    def test_embedding_through_a_transposed_view(self) -> None:
        embedding = torch.randint(-127, 128, (500, 24), dtype=torch.int8)
        done = exchange(RING8, embedding.t(), 2048)
        assert np.array_equal(done.got, done.want)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    @pytest.mark.parametrize("name", RLWE_PARAMS)
    @pytest.mark.parametrize("num_slots", [2048, 128])
    def test_on_cuda(self, name: str, num_slots: int) -> None:
        for m, n in [(96, 40), (40, 96), (33, 17)]:
            weight = torch.randint(-127, 128, (m, n), dtype=torch.int8).cuda()
            done = exchange(RLWE_PARAMS[name], weight, num_slots)
            assert np.array_equal(done.got, done.want)


class TestPublicPolynomials:
    def test_blocks_are_pieces_of_one_expansion(self) -> None:
        a_key = os.urandom(32)
        whole = expand_a(a_key, MAP_INDEX, 0, 20, RING32)
        assert whole.shape == (20, 7, 2048) and whole.dtype == np.int8
        part = np.empty((6, 7, 2048), np.int8)
        fill_a(a_key, MAP_INDEX, 11, part)
        assert np.array_equal(part, whole[11:17])

    def test_keys_and_maps_have_their_own(self) -> None:
        a_key = os.urandom(32)
        first = expand_a(a_key, 0, 0, 1, RING8)
        assert not np.array_equal(first, expand_a(a_key, 1, 0, 1, RING8))
        assert not np.array_equal(first, expand_a(os.urandom(32), 0, 0, 1, RING8))

    def test_uniform(self) -> None:
        planes = expand_a(os.urandom(32), 0, 0, 32, RING32)
        assert looks_uniform(planes.view(np.uint8).transpose(0, 2, 1))


class TestCiphertexts:
    @pytest.mark.parametrize(("name", "upload_bytes"), WIDTHS)
    def test_b_is_its_definition(
        self, name: str, upload_bytes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Bit for bit: b = a t + e + Delta r mod q, rounded to even."""
        params = RLWE_PARAMS[name]
        errors = []

        def recorded(count: int, eta: int) -> np.ndarray:
            errors.append(centered_binomial(count, eta))
            return errors[-1]

        monkeypatch.setattr(rlwe, "centered_binomial", recorded)
        secret, a_key = BatchSecret.generate(params), os.urandom(32)
        r_TJ = random_pads(params, 1024, 5)
        block = encrypt_block(secret, a_key, MAP_INDEX, 0, r_TJ, upload_bytes)
        a_JDN = torch.from_numpy(expand_a(a_key, MAP_INDEX, 0, 5, params))
        a = combine_planes(a_JDN.movedim(1, 0).int().contiguous(), 8 * params.num_planes).long()
        b = times_secret(secret, signed(a, params.log2_q))
        b += torch.from_numpy(np.concatenate(errors).astype(np.int64)).view_as(b)
        message = torch.from_numpy(r_TJ.T.astype(np.int64))
        b[:, :1024] += message << (params.log2_q - params.log2_p)
        dropped = params.dropped_upload_bits(upload_bytes)
        if dropped:
            half = 1 << (dropped - 1)
            down, rest = b >> dropped, b & (2 * half - 1)
            b = down + ((rest > half) | ((rest == half) & (down & 1 == 1)))
        want = b % (1 << (params.log2_q - dropped))
        assert torch.equal(unpack_uints(torch.from_numpy(block)), want)

    @pytest.mark.parametrize(("name", "upload_bytes"), WIDTHS)
    @pytest.mark.parametrize("extreme", [False, True])
    def test_bytes_are_uniform_whatever_the_pads(
        self, name: str, upload_bytes: int, extreme: bool
    ) -> None:
        params = RLWE_PARAMS[name]
        secret = BatchSecret.generate(params)
        value = np.iinfo(params.message_dtype).max if extreme else 0
        r_TJ = np.full((2048, 48), value, params.message_dtype)
        block = encrypt_block(secret, os.urandom(32), MAP_INDEX, 0, r_TJ, upload_bytes)
        if upload_bytes == 7:  # 53 bits: the top byte holds the 5 bits below q, and nothing above
            assert block[..., 6].max() < 32
            filled = block.copy()
            filled[..., 6] = (filled[..., 6] << 3) | (block[..., 0] & 7)
            block = filled
        elif params.dropped_upload_bits(upload_bytes):
            # Ties to even make even results likelier by 1/32, exactly as for uniform residues:
            # leave that bit out (tests/privacy checks the exact law).
            coins = np.frombuffer(os.urandom(block[..., 0].size), np.uint8)
            block = block.copy()
            block[..., 0] ^= coins.reshape(block.shape[:2]) & 1
        assert looks_uniform(block)

    @pytest.mark.parametrize(("name", "upload_bytes"), WIDTHS)
    def test_extreme_pads_look_alike(self, name: str, upload_bytes: int) -> None:
        params = RLWE_PARAMS[name]
        secret = BatchSecret.generate(params)
        blocks = []
        for value in (0, np.iinfo(params.message_dtype).max):
            r_TJ = np.full((2048, 48), value, params.message_dtype)
            blocks.append(encrypt_block(secret, os.urandom(32), 0, 0, r_TJ, upload_bytes))
        assert look_alike(*blocks)

    def test_the_same_pads_encrypt_to_unrelated_bytes(self) -> None:
        secret = BatchSecret.generate(RING32)
        r_TJ = random_pads(RING32, 2048, 16)
        first, second = (
            encrypt_block(secret, os.urandom(32), MAP_INDEX, 0, r_TJ, 6) for _ in range(2)
        )
        assert abs(float((first == second).mean()) - 1 / 256) < 0.001
        assert looks_uniform(first ^ second)

    @pytest.mark.parametrize(("name", "upload_bytes"), [("ring32", 7), ("ring8", 4)])
    def test_every_coefficient_carries_a_fresh_error(self, name: str, upload_bytes: int) -> None:
        params = RLWE_PARAMS[name]
        secret, a_key = BatchSecret.generate(params), os.urandom(32)
        r_TJ = random_pads(params, 256, 40)
        block = encrypt_block(secret, a_key, MAP_INDEX, 0, r_TJ, upload_bytes)
        assert has_fresh_error(residual(secret, a_key, block, r_TJ), params.error_eta)


class TestPlantedFaultsAreSeen:
    """The statistics above are worth something only if they fail on broken encryption."""

    def encrypt(self, value: int, secret: BatchSecret | None = None) -> np.ndarray:
        r_TJ = np.full((2048, 48), value, np.uint32)
        secret = secret or BatchSecret.generate(RING32)
        return encrypt_block(secret, bytes(32), MAP_INDEX, 0, r_TJ, 7)

    def test_no_error_term(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rlwe, "centered_binomial", lambda count, eta: np.zeros(count, np.int8))
        secret = BatchSecret.generate(RING32)
        block = self.encrypt(3, secret)
        error = residual(secret, bytes(32), block, np.full((2048, 48), 3, np.uint32))
        assert not has_fresh_error(error, RING32.error_eta)

    def test_repeated_error_term(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fixed = centered_binomial(2048, 21)
        monkeypatch.setattr(
            rlwe, "centered_binomial", lambda count, eta: np.tile(fixed, count // 2048)
        )
        secret = BatchSecret.generate(RING32)
        error = residual(
            secret, bytes(32), self.encrypt(3, secret), np.full((2048, 48), 3, np.uint32)
        )
        assert not has_fresh_error(error, RING32.error_eta)

    def test_no_public_polynomial(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            rlwe,
            "expand_a",
            lambda key, index, first, count, params: np.zeros((count, 7, 2048), np.int8),
        )
        assert not looks_uniform(self.encrypt(0))
        assert not look_alike(self.encrypt(0), self.encrypt(2**32 - 1))

    def test_no_secret(self) -> None:
        """b = e + Delta r: readable by anyone."""
        zero = np.zeros(2048, np.int8)
        assert not looks_uniform(self.encrypt(0, BatchSecret(RING32, zero)))
        assert not look_alike(
            self.encrypt(0, BatchSecret(RING32, zero)),
            self.encrypt(2**32 - 1, BatchSecret(RING32, zero)),
        )

    def test_integer_bits_above_q(self) -> None:
        """What 7-byte uploads would look like without the reduction mod q."""
        secret, a_key = BatchSecret.generate(RING32), os.urandom(32)
        a_JDN = torch.from_numpy(expand_a(a_key, MAP_INDEX, 0, 8, RING32))
        a = combine_planes(a_JDN.movedim(1, 0).int().contiguous(), 56)
        unreduced = times_secret(secret, signed(a, 53))
        assert bool((((unreduced >> 48) & 0xFF) >= 32).any())


class TestReuseIsRefused:
    def encrypt(
        self, secret: BatchSecret, a_key: bytes, index: int, first: int, count: int
    ) -> None:
        r_TJ = np.zeros((64, count), secret.params.message_dtype)
        encrypt_block(secret, a_key, index, first, r_TJ, secret.params.upload_bytes[0])

    @pytest.mark.parametrize(("first", "count"), [(4, 1), (4, 6), (0, 5), (9, 3), (5, 2), (0, 20)])
    def test_same_secret_key_map_and_coordinate(self, first: int, count: int) -> None:
        secret, a_key = BatchSecret.generate(RING8), os.urandom(32)
        self.encrypt(secret, a_key, 3, 4, 6)
        with pytest.raises(SecretReused, match=r"map 3 were already encrypted .* fresh a_key"):
            self.encrypt(secret, a_key, 3, first, count)

    def test_fresh_key_other_map_and_other_coordinates_are_allowed(self) -> None:
        secret, a_key = BatchSecret.generate(RING8), os.urandom(32)
        self.encrypt(secret, a_key, 3, 4, 6)
        self.encrypt(secret, a_key, 3, 10, 2)
        self.encrypt(secret, a_key, 3, 0, 4)
        self.encrypt(secret, a_key, 4, 4, 6)
        self.encrypt(secret, os.urandom(32), 3, 4, 6)
        self.encrypt(BatchSecret.generate(RING8), a_key, 3, 4, 6)

    def test_what_reuse_would_reveal(self) -> None:
        """The reason for the rule: under one a_j and t, the difference of the pads is readable."""
        secret, a_key = BatchSecret.generate(RING8), os.urandom(32)
        first, second = random_pads(RING8, 2048, 2), random_pads(RING8, 2048, 2)
        blocks = []
        for r_TJ in (first, second):
            fresh_guard = BatchSecret(RING8, secret._t_N)
            block = encrypt_block(fresh_guard, a_key, MAP_INDEX, 0, r_TJ, 4)
            blocks.append(unpack_uints(torch.from_numpy(block)))
        leaked = ((blocks[0] - blocks[1] + (1 << 23)) >> 24).numpy().astype(np.uint8)
        assert np.array_equal(leaked.T, first - second)

    @given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=25))
    @settings(max_examples=60, deadline=None)
    def test_ranges_against_a_set(self, requests: list[tuple[int, int]]) -> None:
        secret = BatchSecret(RING8, np.zeros(2048, np.int8))
        spent: set[int] = set()
        for first, count in requests:
            wanted = set(range(first, first + count))
            if wanted & spent:
                with pytest.raises(SecretReused):
                    secret.spend(b"key", 0, first, count)
            else:
                secret.spend(b"key", 0, first, count)
                spent |= wanted

    def test_two_threads_cannot_spend_the_same_coordinate(self) -> None:
        secret = BatchSecret(RING8, np.zeros(2048, np.int8))
        outcomes: list[bool] = []

        def work() -> None:
            for first in range(200):
                try:
                    secret.spend(b"key", 0, first, 1)
                    outcomes.append(True)
                except SecretReused:
                    outcomes.append(False)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert outcomes.count(True) == 200 and len(outcomes) == 800


class TestSecretStaysSecret:
    def test_not_printed(self) -> None:
        secret = BatchSecret.generate(RING32)
        assert repr(secret) == str(secret) == "BatchSecret(ring32, hidden)"
        assert not hasattr(secret, "__dict__")

    @pytest.mark.parametrize("attempt", [pickle.dumps, copy.copy, copy.deepcopy])
    def test_not_pickled_or_copied(self, attempt: Callable[[BatchSecret], object]) -> None:
        with pytest.raises(TypeError, match="never pickled or copied"):
            attempt(BatchSecret.generate(RING32))

    def test_fresh_every_time(self) -> None:
        first, second = BatchSecret.generate(RING32), BatchSecret.generate(RING32)
        assert not np.array_equal(first._t_N, second._t_N)


class TestMisuse:
    def test_encrypt(self) -> None:
        secret, a_key = BatchSecret.generate(RING32), os.urandom(32)
        pads = np.zeros((64, 2), np.uint32)
        with pytest.raises(TypeError, match="encrypts uint32 pads, got uint8"):
            encrypt_block(secret, a_key, 0, 0, pads.astype(np.uint8), 6)
        with pytest.raises(ParameterError, match="63 slots"):
            encrypt_block(secret, a_key, 0, 0, pads[:63], 6)
        with pytest.raises(ParameterError, match="4 upload bytes"):
            encrypt_block(secret, a_key, 0, 0, pads, 4)
        with pytest.raises(ValueError, match="32 bytes, not 16"):
            encrypt_block(secret, a_key[:16], 0, 0, pads, 6)
        with pytest.raises(ValueError, match="at least one coordinate"):
            encrypt_block(secret, a_key, 0, 0, pads[:, :0], 6)

    @pytest.mark.parametrize(
        "shape", [(2, 2, 2048, 5), (1, 2, 2048, 6), (1, 1, 2048, 5), (1, 2, 1024, 5), (1,)]
    )
    def test_answers_of_another_shape(self, shape: tuple[int, ...]) -> None:
        secret = BatchSecret.generate(RING32)
        with pytest.raises(ProtocolError, match="expected"):
            decrypt_block(secret, RING32, np.zeros(shape, np.uint8), 1024, 2)

    def test_answers_of_another_type_or_set(self) -> None:
        secret = BatchSecret.generate(RING32)
        with pytest.raises(ProtocolError, match="int8"):
            decrypt_block(secret, RING32, np.zeros((1, 2, 2048, 5), np.int8), 2048, 1)
        with pytest.raises(ValueError, match="belongs to ring32, not to ring8"):
            decrypt_block(secret, RING8, np.zeros((1, 2, 2048, 2), np.uint8), 2048, 1)

    def test_any_bytes_of_the_right_shape_decrypt_to_something(self) -> None:
        """A deviating server gets no exception to observe, aligned or not."""
        secret = BatchSecret.generate(RING32)
        frame = np.frombuffer(os.urandom(2 * 2048 * 5 + 3), np.uint8)[3:]
        answer = frame.reshape(1, 2, 2048, 5)
        got = decrypt_block(secret, RING32, answer, 2048, 1)
        assert got.shape == (1, 2048)
        assert np.array_equal(got, decrypt_block(secret, RING32, answer.copy(), 2048, 1))
