"""Client side of the preprocessing: encrypt pads, decrypt W r.

A batch has T slots. The pads of input coordinate j over all slots are the first T coefficients of
one message polynomial r_j, encrypted as

    b_j = a_j t + e_j + Delta r_j   mod q,   Delta = q / p,

with a_j public (expanded from ``a_key``), t the batch's secret and e_j fresh. The server answers
with rounded sum_j W_ij a_j and sum_j W_ij b_j, g = N / T outputs packed into one pair by
multiplication with X^(uT); the client takes second - first * t and rounds: W r
(plaintext-ciphertext products as plaintext GEMMs: Bae, Cheon, Hanrot, Park, Stehle, CRYPTO 2024).

Security rests on two rules that ``BatchSecret`` enforces or that its owner must keep:

- **One b per (t, a_j).** Two encryptions under the same a_j and t differ by
  e - e' + Delta (r - r'): they reveal the difference of the pads and let errors be averaged out.
  a_j is determined by (a_key, map, coordinate), so ``encrypt_block`` refuses to use one twice. To
  repeat a map after a lost connection, draw a fresh ``a_key`` for it; encrypting the same pads
  again under fresh a_j is just another RLWE sample.
- **One batch per secret.** A ``BatchSecret`` is made for one batch and dropped with it. It cannot
  be pickled, copied or printed.

Shape suffixes: J coordinates of a block, N ring degree, T slots, G groups (answer ciphertexts),
g outputs packed into one group, D digit planes.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import Any, Generic, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from otpipe.crypto import negacyclic
from otpipe.crypto.params import RlweParams, StandardRing
from otpipe.crypto.randomness import KEY_BYTES, centered_binomial, keystream, uniform_ternary
from otpipe.errors import ProtocolError
from otpipe.kernels.cpu import parallel_for

Ring = TypeVar("Ring", bound=StandardRing)

#: polynomials that a thread works on at once: their digits and errors stay in its cache
_TILE = 32


class SecretReused(RuntimeError):  # noqa: N818 - reads as what it is
    """The same public polynomial would encrypt twice under one secret; draw a fresh a_key."""


class BatchSecret(Generic[Ring]):
    """The ternary key t of one batch; see the module's rules. Thread-safe."""

    __slots__ = ("__weakref__", "_lock", "_spectrum", "_spent", "_t_N", "params")

    def __init__(self, params: Ring, t_N: NDArray[np.int8]) -> None:
        self.params = params
        self._t_N = t_N
        self._spectrum = negacyclic.spectrum(t_N)
        #: (a_key, map) -> boundaries of the disjoint, sorted ranges of coordinates already used
        self._spent: dict[tuple[bytes, int], list[int]] = {}
        self._lock = threading.Lock()

    @classmethod
    def generate(cls, params: Ring) -> BatchSecret[Ring]:
        """A fresh secret from the operating system's randomness."""
        return cls(params, uniform_ternary(params.ring_degree))

    def spend(self, a_key: bytes, map_index: int, first_coord: int, count: int) -> None:
        """Mark public polynomials as used.

        Raises:
            SecretReused: one of them was used before; nothing is marked then.
        """
        stop = first_coord + count
        with self._lock:
            spent = self._spent.setdefault((a_key, map_index), [])
            # Boundaries alternate between start and stop: at an even position, first_coord lies
            # in a gap; the gap must reach to stop.
            at = bisect_right(spent, first_coord)
            if at % 2 or (at < len(spent) and spent[at] < stop):
                raise SecretReused(
                    f"Coordinates {first_coord} to {stop - 1} of map {map_index} were already "
                    f"encrypted under this secret and a_key; draw a fresh a_key to repeat a map."
                )
            new = [first_coord, stop]
            if at < len(spent) and spent[at] == stop:  # touches the next range
                del spent[at]
                new.pop()
            if at > 0 and spent[at - 1] == first_coord:  # touches the one before
                del spent[at - 1]
                new.pop(0)
                at -= 1
            spent[at:at] = new

    def __repr__(self) -> str:
        return f"BatchSecret({self.params.name}, hidden)"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("A BatchSecret is never pickled or copied; generate one for each batch.")


def expand_a(
    a_key: bytes, map_index: int, first_coord: int, count: int, params: StandardRing
) -> NDArray[np.int8]:
    """Public polynomials a_j as signed base-256 digits: int8 (J, D, N), D = ceil(log2_q / 8).

    The bytes are AES-256-CTR keystream: D uniform signed digits are a uniform residue mod 2^(8D),
    hence uniform mod q, and are what ``ring_gemm`` would split a_j into.
    """
    out = np.empty((count, params.num_planes, params.ring_degree), np.int8)
    fill_a(a_key, map_index, first_coord, out)
    return out


def fill_a(a_key: bytes, map_index: int, first_coord: int, out_JDN: NDArray[np.int8]) -> None:
    """``expand_a`` into a C-contiguous int8 array."""
    stride = out_JDN.shape[1] * out_JDN.shape[2]
    keystream(a_key, map_index, first_coord * stride, out_JDN.view(np.uint8))


def encrypt_block(
    secret: BatchSecret[RlweParams],
    a_key: bytes,
    map_index: int,
    first_coord: int,
    r_TJ: NDArray[Any],
    upload_bytes: int,
) -> NDArray[np.uint8]:
    """Encrypt the pads of coordinates first_coord .. first_coord + J - 1 of one map.

    a_key: 32 uniform bytes, public, fresh for every attempt at a map.
    r_TJ: (T, J) uint32 (ring32) or uint8 (ring8), one row per slot, T a power of two <= N.
    upload_bytes: as ``noise.choose_upload_bytes`` says.
    Returns uint8 (J, N, upload_bytes): b_j mod q little-endian, low bits rounded away if they do
    not fit.
    Rounding a ciphertext is post-processing: it cannot weaken it.

    Raises:
        SecretReused: a coordinate was encrypted before under this secret and a_key.
        ParameterError: the number of slots or upload_bytes is not one of the set's.
    """
    params = secret.params
    num_slots, count = r_TJ.shape
    params.pack_factor(num_slots)
    dropped_bits = params.dropped_upload_bits(upload_bytes)
    if r_TJ.dtype != params.message_dtype:
        raise TypeError(f"{params.name} encrypts {params.message_dtype} pads, got {r_TJ.dtype}.")
    if count < 1 or first_coord < 0:
        raise ValueError(f"A block has at least one coordinate, got {first_coord} + {count}.")
    if len(a_key) != KEY_BYTES:
        raise ValueError(f"a_key has {KEY_BYTES} bytes, not {len(a_key)}.")
    secret.spend(a_key, map_index, first_coord, count)

    degree = params.ring_degree
    tables = negacyclic.tables_for(secret._spectrum)
    message_TJ = r_TJ.astype(np.uint32, copy=False)  # one width to compile for
    out = np.empty((count, degree, upload_bytes), np.uint8)
    words = out.reshape(count, -1).view(np.uint64)

    def body(lo: int, hi: int) -> None:
        for start in range(lo, hi, _TILE):
            size = min(hi, start + _TILE) - start
            a_JDN = expand_a(a_key, map_index, first_coord + start, size, params)
            error = centered_binomial(size * degree, params.error_eta).reshape(size, degree)
            negacyclic.encrypt(
                a_JDN,
                error,
                message_TJ,
                start,
                params.log2_q,
                params.log2_q - params.log2_p,
                dropped_bits,
                upload_bytes,
                tables,
                words[start : start + size],
            )

    parallel_for(body, count, _TILE)
    return out


def decrypt_block(
    secret: BatchSecret[RlweParams],
    params: RlweParams,
    answer: NDArray[np.uint8],
    num_slots: int,
    num_outputs: int,
) -> NDArray[Any]:
    """Decrypt consecutive answer groups: W r of ``num_outputs`` outputs, (num_outputs, T).

    answer: uint8 (G, 2, N, answer_bytes), groups of g = N / num_slots outputs; the last group may
    be partly filled. Returns uint32 (ring32) or uint8 (ring8).

    Raises:
        ProtocolError: the answer has another shape than these outputs call for.
    """
    if params != secret.params:
        raise ValueError(f"This secret belongs to {secret.params.name}, not to {params.name}.")
    pack = params.pack_factor(num_slots)
    degree, num_bytes = params.ring_degree, params.answer_bytes
    num_groups = -(-num_outputs // pack)
    if answer.dtype != np.uint8 or answer.shape != (num_groups, 2, degree, num_bytes):
        raise ProtocolError(
            f"An answer of shape {answer.shape} ({answer.dtype}) came for {num_outputs} outputs; "
            f"expected {(num_groups, 2, degree, num_bytes)} bytes."
        )
    answer = np.ascontiguousarray(answer)
    if not _aligned(answer):  # a view into a received frame
        answer = answer.copy()
    words = answer.reshape(num_groups, 2, -1).view(np.uint64)
    tables = negacyclic.tables_for(secret._spectrum)
    out_GN = np.empty((num_groups, degree), np.uint32)

    def body(lo: int, hi: int) -> None:
        negacyclic.decrypt(words[lo:hi], num_bytes, params.log2_p, tables, out_GN[lo:hi])

    parallel_for(body, num_groups, _TILE)
    values = out_GN.reshape(num_groups * pack, num_slots)[:num_outputs]
    return values.astype(params.message_dtype, copy=False)


def _aligned(array: NDArray[Any]) -> bool:
    return array.ctypes.data % 8 == 0
