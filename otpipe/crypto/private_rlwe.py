"""Client side of the preprocessing for private weights: encrypt pads, decrypt c (W r) - s.

As in ``rlwe``, b_j = a_j t + e_j + Delta * (pads) mod q under a secret t of one batch. What is
different: q = 2^128, several input coordinates may share a polynomial (``PrivatePacking``), and
polynomial 0 of every exchange is an encryption of zero, (a_0, b_0 = a_0 t + e_0): the public key
with which the server re-randomises its answers. The rules of ``rlwe`` hold: one b per (t, a_j),
enforced by ``BatchSecret``; one batch per secret.

Shape suffixes: J polynomials of a block, N ring degree, T slots, n input coordinates, G answers,
L limbs, D digit planes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from otpipe.crypto import negacyclic, negacyclic_wide
from otpipe.crypto.negacyclic import twist
from otpipe.crypto.private_params import PrivatePacking, PrivateParams
from otpipe.crypto.randomness import KEY_BYTES, centered_binomial
from otpipe.crypto.rlwe import BatchSecret, fill_a
from otpipe.errors import ProtocolError
from otpipe.kernels import wide
from otpipe.kernels.cpu import Array, kernel, parallel_for, unpack_words

#: polynomials that a thread works on at once
_TILE = 4

PrivateSecret = BatchSecret[PrivateParams]


def encrypt_key(secret: PrivateSecret, a_key: bytes, map_index: int) -> NDArray[np.uint8]:
    """Polynomial 0 of an exchange, an encryption of zero: uint8 (1, N, 16).

    Raises:
        SecretReused: it was made before under this secret and a_key.
    """
    return _encrypt(secret, a_key, map_index, 0, 1, np.zeros((0, 0), np.uint64), 1)


def encrypt_block(
    secret: PrivateSecret,
    packing: PrivatePacking,
    a_key: bytes,
    map_index: int,
    first: int,
    r_Tn: NDArray[np.uint64],
) -> NDArray[np.uint8]:
    """Polynomials first, first + 1, ... of an exchange: the pads of consecutive coordinates.

    a_key: 32 uniform bytes, public, fresh for every attempt at a map.
    first: at least 1; polynomial P holds coordinates (P - 1) v .. P v - 1.
    r_Tn: (T, n) uint64, taken mod 2^k, one row per slot, n the coordinates of this block: a
    multiple of v, except in the last block of a map.
    Returns uint8 (ceil(n / v), N, 16), little-endian residues.

    Raises:
        SecretReused: a polynomial was made before under this secret and a_key.
    """
    num_slots, count = r_Tn.shape
    if packing.params != secret.params:
        raise ValueError(f"This secret belongs to {secret.params.name}.")
    if num_slots != packing.num_slots or count < 1 or first < 1:
        raise ValueError(
            f"Pads of {num_slots} slots and {count} coordinates came for polynomial {first} of a "
            f"batch of {packing.num_slots} slots."
        )
    if r_Tn.dtype != np.uint64:
        raise TypeError(f"{packing.params.name} encrypts uint64 pads, got {r_Tn.dtype}.")
    polynomials = -(-count // packing.inputs)
    return _encrypt(secret, a_key, map_index, first, polynomials, r_Tn, packing.inputs)


def _encrypt(
    secret: PrivateSecret,
    a_key: bytes,
    map_index: int,
    first: int,
    count: int,
    r_Tn: NDArray[np.uint64],
    inputs: int,
) -> NDArray[np.uint8]:
    """Encryptions of ``count`` polynomials, ``inputs`` columns of ``r_Tn`` each, or zero."""
    if len(a_key) != KEY_BYTES:
        raise ValueError(f"a_key has {KEY_BYTES} bytes, not {len(a_key)}.")
    params = secret.params
    secret.spend(a_key, map_index, first, count)
    degree = params.ring_degree
    num_limbs, limb_bits = negacyclic_wide.limbs(params.log2_q, degree)
    real, imag = twist(degree)
    out = np.empty((count, degree, params.upload_bytes), np.uint8)
    words = out.view(np.uint64)

    def body(lo: int, hi: int) -> None:
        size = min(_TILE, hi - lo)
        folded, parts = negacyclic_wide.buffer(size, num_limbs, degree)
        values = np.empty((size, degree, 2), np.uint64)
        public = np.empty((size, params.num_planes, degree), np.int8)
        for start in range(lo, hi, _TILE):
            stop = min(hi, start + _TILE)
            size = stop - start
            fill_a(a_key, map_index, first + start, public[:size])
            wide.words_from_digits(public[:size], values)
            negacyclic_wide.fold_all(values[:size], limb_bits, real, imag, parts)
            negacyclic.multiply(folded[:size], secret._spectrum)
            error = centered_binomial(size * degree, params.error_eta).reshape(size, degree)
            negacyclic_wide.finish_encryption(
                parts,
                error,
                r_Tn[:, start * inputs : stop * inputs],
                inputs,
                params.delta_shift,
                limb_bits,
                real,
                imag,
                words[start:stop],
            )

    parallel_for(body, count, _TILE)
    return out


def decrypt_block(
    secret: PrivateSecret, packing: PrivatePacking, answers: NDArray[np.uint8], num_outputs: int
) -> NDArray[np.uint64]:
    """Results c (W r) - s mod 2^k of consecutive answers: uint64 (num_outputs, T).

    answers: uint8 (G, answer_bytes), g outputs each; the last may be partly filled.

    Raises:
        ProtocolError: the answers have another shape than these outputs call for.
    """
    params = packing.params
    if params != secret.params:
        raise ValueError(f"This secret belongs to {secret.params.name}, not to {params.name}.")
    num_answers = packing.num_answers(num_outputs)
    if answers.dtype != np.uint8 or answers.shape != (num_answers, packing.answer_bytes):
        raise ProtocolError(
            f"An answer of shape {answers.shape} ({answers.dtype}) came for {num_outputs} outputs; "
            f"expected {(num_answers, packing.answer_bytes)} bytes."
        )
    degree, stride, slots = params.ring_degree, packing.stride, packing.num_slots
    split = degree * params.first_bytes
    num_limbs, limb_bits = negacyclic_wide.limbs(params.first_bits, degree)
    real, imag = twist(degree)
    out = np.empty((num_answers, packing.outputs, slots), np.uint64)

    def body(lo: int, hi: int) -> None:
        folded, parts = negacyclic_wide.buffer(1, num_limbs, degree)
        row = np.empty((1, packing.answer_bytes), np.uint8)
        first, second = row[:, :split].view(np.uint64), row[0, split:].view(np.uint64)
        for index in range(lo, hi):
            row[0] = answers[index]  # which may be unaligned, in a received frame
            negacyclic_wide.fold_packed(first, params.first_bytes, limb_bits, real, imag, parts)
            negacyclic.multiply(folded, secret._spectrum)
            _finish_decryption(
                parts[0],
                second,
                params.first_bits,
                params.second_bytes,
                params.log2_p,
                stride,
                limb_bits,
                real,
                imag,
                out[index],
            )

    parallel_for(body, num_answers, _TILE)
    return out.reshape(-1, slots)[:num_outputs]


@kernel
def _finish_decryption(
    product: Array,
    second: Array,
    first_bits: int,
    second_bytes: int,
    log2_p: int,
    stride: int,
    limb_bits: int,
    real: Array,
    imag: Array,
    out_gT: Array,
) -> None:
    """out = round((B - A t) / 2^(first_bits - log2_p)) mod 2^log2_p, B raised to A's units.

    product: A t in the transformed domain, (L, M, 2). second: packed B, output after output.
    """
    degree, slots = 2 * real.shape[0], out_gT.shape[1]
    low, high = np.empty(degree, np.uint64), np.empty(degree, np.uint64)
    negacyclic_wide.unfold(product, limb_bits, real, imag, low, high)
    values = np.empty(out_gT.size, np.uint64)
    unpack_words(second, second_bytes, values)
    up = np.uint64(first_bits - 8 * second_bytes)
    down = np.uint64(first_bits - log2_p)
    half = np.uint64(1) << (down - np.uint64(1))
    mask = (np.uint64(1) << np.uint64(log2_p)) - np.uint64(1)
    for u in range(out_gT.shape[0]):
        for k in range(slots):
            phase = (values[u * slots + k] << up) - low[u * stride + k]
            out_gT[u, k] = ((phase + half) >> down) & mask
