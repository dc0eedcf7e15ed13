"""Key derivation and keystream against published vectors; samplers against their moments."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otpipe.crypto import randomness
from otpipe.crypto.randomness import (
    centered_binomial,
    derive_key,
    hkdf_expand,
    keystream,
    random_bytes,
    uniform_ternary,
)

KEY = bytes(range(32))


def stream(key: bytes, nonce: int | bytes, offset: int, size: int) -> bytes:
    out = np.empty(size, np.uint8)
    keystream(key, nonce, offset, out)
    return out.tobytes()


class TestDeriveKey:
    def test_hkdf_expand_vectors(self) -> None:
        """RFC 5869, appendix A.1 and A.3: the first 32 bytes of OKM."""
        prk = bytes.fromhex("077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5")
        info = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9")
        okm = "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
        assert hkdf_expand(prk, info).hex() == okm
        prk = bytes.fromhex("19ef24a32c717b167f33a91d6f648bdf96596776afdb6377ac434c1c293ccb04")
        okm = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
        assert hkdf_expand(prk, b"").hex() == okm

    def test_known_answers(self) -> None:
        """Pinned: a change would make every stored pad unreadable."""
        assert (
            derive_key(KEY).hex()
            == "61f036e4079464806b74c72a7b412a8bc17404475f22fc0f1b3268af440f59e5"
        )
        assert (
            derive_key(KEY, "pad", 3).hex()
            == "2c3efd989adc82fb317eae6c7bfdf1cdc96cbe03cc7ca8de7db99579cda6e70d"
        )
        assert (
            derive_key(KEY, b"\x00\x01", "x", 0).hex()
            == "a995dff1bf6aa2dd623f7d422a0bbfd97accaab29a582e5fc3eb6710a4c90d15"
        )

    def test_labels_do_not_collide(self) -> None:
        labels: list[tuple[str | int | bytes, ...]] = [
            (),
            ("",),
            ("", ""),
            ("a", "b"),
            ("ab",),
            (b"ab",),
            ("a", b"b"),
            (0,),
            (b"\x00" * 8,),
            (1,),
            ("pad", 1),
            ("pad1",),
        ]
        assert len({derive_key(KEY, *label) for label in labels}) == len(labels)
        assert derive_key(KEY, "pad") != derive_key(bytes(32), "pad")

    def test_misuse(self) -> None:
        with pytest.raises(ValueError, match="32 bytes, not 31"):
            derive_key(KEY[:31], "pad")
        with pytest.raises(TypeError, match="not a bool"):
            derive_key(KEY, True)
        with pytest.raises(OverflowError):
            derive_key(KEY, -1)


class TestKeystream:
    def test_nist_vector(self) -> None:
        """NIST SP 800-38A, F.5.5 (CTR-AES256): output blocks."""
        key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
        counter = int.from_bytes(bytes.fromhex("f8f9fafbfcfdfeff"), "big")
        want = (
            "0bdf7df1591716335e9a8b15c860c502"
            "5a6e699d536119065433863c8f657b94"
            "1bc12c9c01610d5d0d8bd6a3378eca62"
            "2956e1c8693536b1bee99c73a31576b6"
        )
        nonce = bytes.fromhex("f0f1f2f3f4f5f6f7")
        assert stream(key, nonce, 16 * counter, 64).hex() == want
        assert stream(key, int.from_bytes(nonce, "big"), 16 * counter, 64).hex() == want

    @given(
        cuts=st.lists(st.integers(0, 5000), max_size=6),
        start=st.integers(0, 1 << 40),
    )
    @settings(max_examples=40, deadline=None)
    def test_random_access_equals_sequential(self, cuts: list[int], start: int) -> None:
        whole = stream(KEY, 9, start, 5000)
        edges = sorted({0, *cuts, 5000})
        parts = [stream(KEY, 9, start + a, b - a) for a, b in itertools.pairwise(edges)]
        assert b"".join(parts) == whole

    @pytest.mark.parametrize("size", [0, 1, 5, 16, 21])
    def test_the_last_bytes_of_a_stream(self, size: int) -> None:
        end = 16 << 64
        assert stream(KEY, 9, end - size, size) == stream(KEY, 9, end - 32, 32)[32 - size :]
        with pytest.raises(ValueError, match="outside"):
            stream(KEY, 9, end - size, size + 1)

    def test_parallel_equals_serial(self, monkeypatch: pytest.MonkeyPatch) -> None:
        parallel = stream(KEY, 1, 5, 3_000_001)
        monkeypatch.setattr(randomness, "_PARALLEL_BYTES", 1 << 30)
        assert stream(KEY, 1, 5, 3_000_001) == parallel

    def test_nonces_and_keys_separate_streams(self) -> None:
        streams = {stream(key, n, 0, 64) for key in (KEY, bytes(32)) for n in (0, 1, 256)}
        assert len(streams) == 6

    def test_misuse(self) -> None:
        out = np.empty(4, np.uint8)
        with pytest.raises(ValueError, match="32 bytes, not 16"):
            keystream(KEY[:16], 0, 0, out)
        with pytest.raises(ValueError, match="8 bytes, not 7"):
            keystream(KEY, bytes(7), 0, out)
        with pytest.raises(OverflowError):
            keystream(KEY, 1 << 64, 0, out)
        with pytest.raises(ValueError, match="outside"):
            keystream(KEY, 0, -1, out)
        with pytest.raises(ValueError, match="outside"):
            keystream(KEY, 0, (1 << 68) - 3, out)
        with pytest.raises(TypeError, match="contiguous uint8"):
            keystream(KEY, 0, 0, np.empty(4, np.int8))
        with pytest.raises(TypeError, match="contiguous uint8"):
            keystream(KEY, 0, 0, np.empty(8, np.uint8)[::2])


class TestSamplers:
    COUNT = 1 << 20

    def test_ternary(self) -> None:
        values = uniform_ternary(self.COUNT)
        assert values.dtype == np.int8
        counts = np.bincount(values.astype(np.int64) + 1, minlength=3)
        assert counts.sum() == self.COUNT and counts.size == 3
        expected = self.COUNT / 3
        assert ((counts - expected) ** 2 / expected).sum() < 40

    def test_centered_binomial(self) -> None:
        eta = 21
        values = centered_binomial(self.COUNT, eta).astype(float)
        assert values.size == self.COUNT and np.abs(values).max() <= eta
        variance = eta / 2
        assert abs(values.mean()) < 6 * np.sqrt(variance / self.COUNT)
        assert abs(values.var() / variance - 1) < 6 * np.sqrt(2 / self.COUNT)
        kurtosis = (values**4).mean() / variance**2
        assert abs(kurtosis - (3 - 1 / eta)) < 6 * np.sqrt(96 / self.COUNT)
        correlation = (values[1:] * values[:-1]).mean() / variance
        assert abs(correlation) < 6 / np.sqrt(self.COUNT)

    @pytest.mark.parametrize("eta", [1, 8, 16, 24])
    def test_centered_binomial_of_any_width(self, eta: int) -> None:
        values = centered_binomial(1 << 16, eta).astype(float)
        assert np.abs(values).max() <= eta
        assert abs(values.var() / (eta / 2) - 1) < 6 * np.sqrt(2 / values.size)

    def test_centered_binomial_is_a_popcount_of_the_keystream(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        planted = np.frombuffer(os.urandom(3 * 100 * 2), np.uint8).copy()
        monkeypatch.setattr(randomness, "random_bytes", lambda size: planted.copy()[:size])
        words = planted.view(np.uint16).reshape(3, 100)
        want = [
            (int(a) | int(b) << 16 | (int(c) & 0x3FF) << 32).bit_count() - 21 for a, b, c in words.T
        ]
        assert centered_binomial(100, 21).tolist() == want

    def test_eta_beyond_the_words_is_refused(self) -> None:
        with pytest.raises(ValueError, match="from 1 to 24, not 25"):
            centered_binomial(4, 25)

    @pytest.mark.parametrize(
        "sample",
        [random_bytes, uniform_ternary, lambda size: centered_binomial(size, 21)],
    )
    def test_samples_are_fresh(self, sample: Callable[[int], np.ndarray]) -> None:
        assert not np.array_equal(sample(256), sample(256))
        assert sample(0).size == 0
