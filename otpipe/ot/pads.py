"""Pads: what a COT is hashed to, and the guard that no tweak is used twice.

A transfer of one in M = 2^b takes b COTs, whose keys the sender knows as q_j and the receiver as
t_j = q_j + r_j Delta. With alpha a root of the field polynomial of GF(2^128), both form

    X = sum_j alpha^j q_j  (sender)        X + e(r) Delta = sum_j alpha^j t_j  (receiver),

e(m) = sum_j m_j alpha^j the field element whose coefficients are the bits of m. Pad m, block k is

    H(X + e(m) Delta, tweak),      tweak = (number of the first COT, 256 k + m),

so the receiver knows pad r. For m != r its input is off by e(m + r) Delta, a uniform value, as
e(m + r) != 0 is invertible: one pad each of a correlation-robust hash, at the price of one hash for
each message, where b keys hashed apart would cost b. For b = 1 this is the usual H(q), H(q + Delta)
of Ishai, Kilian, Nissim, Petrank (CRYPTO 2003). Linear combinations of keys under one Delta as
1-of-N keys: Kolesnikov, Kumaresan (CRYPTO 2013); Kolesnikov, Kumaresan, Rosulek, Trieu (CCS 2016).

H is TMMO of Guo, Katz, Wang, Yu (IEEE S&P 2020, section 7.4): pi(pi(x) + tweak) + pi(x), pi AES-128
under a key that both parties' nonces determine. The key changes every 2^log2_epoch COTs: the bound
grows with the number of pads under one permutation (as in Guo, Katz, Wang, Weng, Yu, CRYPTO 2020).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from otpipe.errors import ParameterError
from otpipe.kernels.aes_planes import expand_keys
from otpipe.ot.params import OtParams

KEY_GROUP = 64
"""Epochs whose keys are expanded together: the circuit costs as much for one."""

_KEY_DOMAIN = b"otpipe OT hash key v1"
_FIELD_POLYNOMIAL = (1 << 128) | 0b10000111


def hash_key(session: bytes, epoch: int) -> bytes:
    """Key of the permutation in one epoch: public, 16 bytes."""
    return hashlib.sha256(_KEY_DOMAIN + session + epoch.to_bytes(8, "little")).digest()[:16]


@lru_cache(maxsize=256)  # sessions that take turns; 11 KiB each
def _key_group(session: bytes, group: int) -> NDArray[np.uint8]:
    first = group * KEY_GROUP
    keys = b"".join(hash_key(session, first + i) for i in range(KEY_GROUP))
    return expand_keys(np.frombuffer(keys, np.uint8).reshape(KEY_GROUP, 16))


def round_keys(session: bytes, epoch: int) -> NDArray[np.uint8]:
    """Round keys of the permutation in one epoch: uint8 (11, 16), not to be changed."""
    group, at = divmod(epoch, KEY_GROUP)
    return _key_group(session, group)[at]


def offset_table(delta: bytes, index_bits: int) -> NDArray[np.uint64]:
    """e(m) Delta for m = 0 ... 2^index_bits - 1: uint64 (M, 2)."""
    powers = [int.from_bytes(delta, "little")]
    for _ in range(index_bits - 1):
        doubled = powers[-1] << 1
        powers.append(doubled ^ (doubled >> 128) * _FIELD_POLYNOMIAL)
    table = [0]
    for power in powers:
        table += [entry ^ power for entry in table]
    octets = b"".join(entry.to_bytes(16, "little") for entry in table)
    return np.frombuffer(octets, np.uint64).reshape(-1, 2)


def blocks_per_pad(words: int, bits: int) -> int:
    """AES blocks of one pad for a message of ``words`` times ``bits`` bits."""
    return -(-words * bits // 128)


class TweakLedger:
    """Numbers of COTs that have been hashed; each may be, once, in ascending order.

    One for each party and session. It stands at the hash itself, behind everything that counts.
    """

    def __init__(self, params: OtParams) -> None:
        self._limit = params.max_cots
        self._epoch_cots = params.epoch_cots
        self.log2_epoch = params.log2_epoch
        self._next = 0

    @property
    def next(self) -> int:
        """The first number that has not been used."""
        return self._next

    def claim(self, first: int, count: int) -> None:
        """Use the tweaks of COTs ``first`` to ``first + count``.

        Raises:
            RuntimeError: some of them were used before.
            ParameterError: the session has no tweak left for them.
        """
        if first < self._next:
            raise RuntimeError(
                f"Hash tweak {first} was used before in this session, whose next one is "
                f"{self._next}; a tweak used twice would give messages away, so the session ends."
            )
        if first + count > self._limit:
            raise ParameterError(
                f"This OT session would pass its limit of {self._limit} transfers; "
                f"open a new connection, which has new keys."
            )
        self._next = first + count

    def epochs(self, first: int, count: int, stride: int) -> Iterator[tuple[int, int, int]]:
        """Ranges (lo, hi, epoch) of ``count`` transfers of ``stride`` COTs from COT ``first``.

        A transfer belongs to the epoch of its first COT.
        """
        lo = 0
        while lo < count:
            epoch = (first + lo * stride) // self._epoch_cots
            left = (epoch + 1) * self._epoch_cots - (first + lo * stride)
            hi = min(count, lo + -(-left // stride))
            yield lo, hi, epoch
            lo = hi
