"""End to end: c (W r) - s exactly. Uploads: their definition, and nothing about the pads."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from crypto_helpers import has_fresh_error, look_alike, looks_uniform
from private_helpers import (
    INSECURE,
    MAP_INDEX,
    MODULUS,
    PRIVATE44,
    blocks,
    centred,
    exchange,
    from_digits,
    from_octets,
    plus,
    random_map,
    random_pads,
    times,
    use_backend,
)

from otpipe.crypto import private_rlwe
from otpipe.crypto.private_params import PrivatePacking, PrivateParams, choose_packing
from otpipe.crypto.private_rlwe import decrypt_block, encrypt_block, encrypt_key
from otpipe.crypto.randomness import centered_binomial
from otpipe.crypto.rlwe import BatchSecret, SecretReused, expand_a
from otpipe.errors import ProtocolError


class TestEndToEnd:
    @pytest.mark.parametrize("backend", ["compiled", "torch"])
    @pytest.mark.parametrize(
        ("m", "n", "num_slots", "inputs"),
        [(3, 5, 64, 1), (7, 9, 32, 1), (9, 5, 8, 8), (33, 17, 8, 1), (13, 30, 8, 4), (1, 1, 16, 2)],
    )
    def test_every_result_is_exact(
        self,
        backend: str,
        m: int,
        n: int,
        num_slots: int,
        inputs: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        use_backend(monkeypatch, backend)
        done = exchange(PrivatePacking(INSECURE, num_slots, inputs), *random_map(m, n))
        assert done.got.shape == (m, num_slots) and done.got.dtype == np.uint64
        assert np.array_equal(done.got, done.want)

    @pytest.mark.parametrize(("m", "n", "num_slots"), [(5, 9, 8192), (40, 30, 512), (70, 70, 64)])
    def test_at_full_size(self, m: int, n: int, num_slots: int) -> None:
        packing = choose_packing(PRIVATE44, n, m, num_slots)
        done = exchange(packing, *random_map(m, n))
        assert np.array_equal(done.got, done.want)

    def test_embedding_through_a_transposed_view(self) -> None:
        digits = torch.randint(-128, 128, (50, 24), dtype=torch.int8)
        ones = torch.ones(24, dtype=torch.int64)
        done = exchange(choose_packing(PRIVATE44, 50, 24, 128), digits.t(), ones)
        assert np.array_equal(done.got, done.want)

    @pytest.mark.gpu
    @pytest.mark.parametrize(
        ("m", "n", "num_slots"), [(96, 40, 8192), (40, 96, 1024), (33, 17, 64)]
    )
    def test_on_cuda(self, m: int, n: int, num_slots: int) -> None:
        packing = choose_packing(PRIVATE44, n, m, num_slots)
        done = exchange(packing, *random_map(m, n, "cuda"))
        assert np.array_equal(done.got, done.want)


class TestCiphertexts:
    @pytest.mark.parametrize("inputs", [1, 4])
    def test_b_is_its_definition(self, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Integer for integer: b_J = a_J t + e_J + Delta sum_w X^(wT) r, and b_0 of zero."""
        errors = []

        def recorded(count: int, eta: int) -> np.ndarray:
            errors.append(centered_binomial(count, eta))
            return errors[-1]

        monkeypatch.setattr(private_rlwe, "centered_binomial", recorded)
        packing = PrivatePacking(INSECURE, 16, inputs)
        secret, a_key, n = BatchSecret.generate(INSECURE), os.urandom(32), 6
        r_Tn = random_pads(16, n)
        sent = [block for _, block in blocks(secret, packing, a_key, r_Tn, 2)]
        b = from_octets(np.concatenate(sent))
        count = packing.num_polynomials(n)
        assert len(b) == count
        error = np.concatenate(errors).reshape(count, -1).tolist()
        a = from_digits(expand_a(a_key, MAP_INDEX, 0, count, INSECURE))
        for number in range(count):
            message = [0] * 64
            for turn in range(inputs if number else 0):
                j = (number - 1) * inputs + turn
                if j < n:
                    pads = [int(r) % (1 << 44) for r in r_Tn[:, j]]
                    message[turn * 16 : turn * 16 + 16] = [r << 84 for r in pads]
            want = plus(times(a[number], secret._t_N.tolist()), error[number], message)
            assert b[number] == want

    @pytest.mark.parametrize("value", [0, (1 << 44) - 1])
    def test_bytes_are_uniform_whatever_the_pads(self, value: int) -> None:
        assert looks_uniform(upload_of(value))

    def test_extreme_pads_look_alike(self) -> None:
        assert look_alike(upload_of(0), upload_of((1 << 44) - 1))

    def test_the_same_pads_encrypt_to_unrelated_bytes(self) -> None:
        secret = BatchSecret.generate(PRIVATE44)
        first, second = (upload_of(7, secret) for _ in range(2))
        assert abs(float((first == second).mean()) - 1 / 256) < 0.001
        assert looks_uniform(first ^ second)

    def test_every_coefficient_carries_a_fresh_error(self) -> None:
        assert has_fresh_error(errors_of_upload(INSECURE), INSECURE.error_eta)

    @pytest.mark.parametrize("fault", ["none", "repeated"])
    def test_planted_faults_are_seen(self, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
        fixed = centered_binomial(64, 21)

        def broken(count: int, eta: int) -> np.ndarray:
            return np.zeros(count, np.int8) if fault == "none" else np.tile(fixed, count // 64)

        monkeypatch.setattr(private_rlwe, "centered_binomial", broken)
        assert not has_fresh_error(errors_of_upload(INSECURE), INSECURE.error_eta)


def upload_of(value: int, secret: BatchSecret | None = None) -> np.ndarray:
    """Twelve polynomials whose pads are all ``value``."""
    secret = secret or BatchSecret.generate(PRIVATE44)
    r_Tn = np.full((8192, 12), value, np.uint64)
    packing = PrivatePacking(PRIVATE44, 8192, 1)
    return encrypt_block(secret, packing, os.urandom(32), MAP_INDEX, 1, r_Tn)


def errors_of_upload(params: PrivateParams) -> torch.Tensor:
    """b - a t - Delta r of an upload, signed: (polynomials, N)."""
    packing = PrivatePacking(params, 16, 1)
    secret, a_key, n = BatchSecret.generate(params), os.urandom(32), 300
    r_Tn = random_pads(16, n)
    b = from_octets(
        np.concatenate([block for _, block in blocks(secret, packing, a_key, r_Tn, 50)])
    )
    a = from_digits(expand_a(a_key, MAP_INDEX, 0, n + 1, params))
    rows = []
    for number in range(n + 1):
        known = times(a[number], secret._t_N.tolist())
        if number:
            for slot in range(16):
                known[slot] += int(r_Tn[slot, number - 1]) << 84
        rows.append([centred(x - y) for x, y in zip(b[number], known, strict=True)])
    assert max(abs(value) for row in rows for value in row) < MODULUS >> 100
    return torch.tensor(rows)


class TestMisuse:
    packing = PrivatePacking(INSECURE, 16, 2)

    def test_a_polynomial_is_encrypted_once(self) -> None:
        secret, a_key = BatchSecret.generate(INSECURE), os.urandom(32)
        encrypt_key(secret, a_key, 0)
        with pytest.raises(SecretReused, match="draw a fresh a_key"):
            encrypt_key(secret, a_key, 0)
        encrypt_block(secret, self.packing, a_key, 0, 1, random_pads(16, 6))
        with pytest.raises(SecretReused, match="draw a fresh a_key"):
            encrypt_block(secret, self.packing, a_key, 0, 3, random_pads(16, 2))
        encrypt_block(secret, self.packing, a_key, 0, 4, random_pads(16, 2))

    def test_pads_of_another_shape_or_type(self) -> None:
        secret, a_key = BatchSecret.generate(INSECURE), os.urandom(32)
        for pads, first in ((random_pads(8, 2), 1), (random_pads(16, 2), 0)):
            with pytest.raises(ValueError, match="came for polynomial"):
                encrypt_block(secret, self.packing, a_key, 0, first, pads)
        with pytest.raises(TypeError, match="encrypts uint64 pads, got int64"):
            encrypt_block(secret, self.packing, a_key, 0, 1, random_pads(16, 2).astype(np.int64))
        with pytest.raises(ValueError, match="32 bytes, not 16"):
            encrypt_key(secret, bytes(16), 0)

    def test_a_secret_of_another_set(self) -> None:
        secret = BatchSecret.generate(PRIVATE44)
        with pytest.raises(ValueError, match="belongs to private44"):
            encrypt_block(secret, self.packing, bytes(32), 0, 1, random_pads(16, 2))
        with pytest.raises(ValueError, match="belongs to private44"):
            decrypt_block(secret, self.packing, np.zeros((1, 1), np.uint8), 2)

    @pytest.mark.parametrize("change", ["short", "many", "wide"])
    def test_answers_of_another_shape(self, change: str) -> None:
        secret, size = BatchSecret.generate(INSECURE), self.packing.answer_bytes
        shape = {"short": (1, size - 8), "many": (2, size), "wide": (1, size)}[change]
        dtype = np.uint16 if change == "wide" else np.uint8
        with pytest.raises(ProtocolError, match=rf"came for 2 outputs; expected \(1, {size}\)"):
            decrypt_block(secret, self.packing, np.zeros(shape, dtype), 2)

    def test_unaligned_answers_are_read(self) -> None:
        done = exchange(self.packing, *random_map(5, 7))
        frame = np.concatenate([np.zeros(3, np.uint8), done.answers.reshape(-1)])
        unaligned = frame[3:].reshape(done.answers.shape)
        assert np.array_equal(decrypt_block(done.secret, self.packing, unaligned, 5), done.want)
