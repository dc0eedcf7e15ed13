"""Products of two parties' matrices ahead of time: exact, of the sizes computed, and hidden."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hiding_helpers import NORMAL_LIMIT, Unrounded, first_part_fits, matched_filter, plant
from numpy.typing import NDArray
from private_helpers import MAP_INDEX, power, times, use_backend
from torch import Tensor

from otpipe.crypto import private_evaluate, private_matmul
from otpipe.crypto.private_matmul import (
    MATMUL_PARAMS,
    MatmulParams,
    ProductPlan,
    ProductServer,
    client_share,
    levels_of,
    params_for_bits,
    signed_digits,
    upload,
)
from otpipe.crypto.private_matmul_noise import check_preparation, log2_distance, squared_distance
from otpipe.crypto.private_noise import log2_failure
from otpipe.crypto.private_secrets import fresh_mask_key
from otpipe.crypto.randomness import random_bytes
from otpipe.crypto.rlwe import BatchSecret, SecretReused
from otpipe.errors import ParameterError, ProtocolError
from otpipe.kernels.cpu import in_this_thread

PRODUCT40, PRODUCT51 = MATMUL_PARAMS


class InsecureMatmulParams(MatmulParams):
    """INSECURE: a ring degree outside the table, refused everywhere but here."""

    def __post_init__(self) -> None:
        """Check nothing."""


def insecure(params: MatmulParams, degree: int = 64) -> InsecureMatmulParams:
    return InsecureMatmulParams(**{**vars(params), "name": "INSECURE", "ring_degree": degree})


@dataclass
class Product:
    """One product, both sides."""

    plan: ProductPlan
    secrets: list[BatchSecret]
    a_key: bytes
    uploaded: int
    answers: list[NDArray[np.uint8]]
    client: Tensor
    server: Tensor

    @property
    def opened(self) -> list[list[int]]:
        return ((self.client + self.server) & ((1 << self.plan.params.log2_p) - 1)).tolist()


def product(params: MatmulParams, x: Tensor, y: Tensor, device: str = "cpu") -> Product:
    """All pieces of x (m, n) times y (n, T), the server on ``device``."""
    plan = ProductPlan(params, len(x), len(y), y.shape[1])
    secret, a_key = BatchSecret.generate(params), os.urandom(32)
    done = Product(plan, [secret], a_key, 0, [], torch.empty(0), torch.empty(0))
    client, server = [], []
    for index, piece in enumerate(plan.pieces, MAP_INDEX):
        side, at = ProductServer(x.to(device), plan, piece, a_key, index), 0
        for block in upload(secret, plan, piece, a_key, index, y):
            side.add_block(at, torch.from_numpy(block))
            at += len(block)
            done.uploaded += block.size
        answers = np.concatenate([part.numpy() for _, part in side.answers()])
        done.answers.append(answers)
        client.append(client_share(secret, plan, piece, answers))
        server.append(side.share())
    done.client, done.server = torch.cat(client, 1), torch.cat(server, 1)
    return done


def ring(shape: tuple[int, ...], bits: int) -> Tensor:
    words = torch.from_numpy(random_bytes(8 * int(np.prod(shape))).view(np.int64))
    return (words & ((1 << bits) - 1)).view(shape)


def exact(x: Tensor, y: Tensor, bits: int) -> list[list[int]]:
    """x y mod 2^bits by Python integers."""
    values = x.numpy().astype(object) @ y.numpy().astype(object)
    return (values % (1 << bits)).tolist()


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", MATMUL_PARAMS, ids=lambda params: params.name)
def test_digits_and_levels_make_up_the_value(params: MatmulParams) -> None:
    bits = params.log2_p
    edges = [0, 1, (1 << bits) - 1, 1 << (bits - 1), (1 << params.digit_bits) - 1]
    x = torch.cat([torch.tensor(edges), ring((2000,), bits)])[None]
    digits = signed_digits(x, params)
    assert digits.shape == (1, x.shape[1] * params.num_digits)
    assert int(digits.abs().max()) <= 1 << (params.digit_bits - 1)
    levels = levels_of(digits, params)
    assert all(int(level.min()) >= -64 and int(level.max()) <= 64 for level in levels)
    assert torch.equal(sum(level.long() << (7 * i) for i, level in enumerate(levels)), digits)
    parts = digits.view(params.num_digits, -1)
    joined = sum(part << (params.digit_bits * i) for i, part in enumerate(parts))
    assert torch.equal(joined & ((1 << bits) - 1), x[0])


@pytest.mark.parametrize("params", MATMUL_PARAMS, ids=lambda params: params.name)
def test_products_are_exact_at_full_size(params: MatmulParams) -> None:
    """Extremes in every place of one row and column; columns that take two exchanges."""
    bits = params.log2_p
    x, y = ring((5, 33), bits), ring((33, 20), bits)
    x[0], y[:, 0] = (1 << bits) - 1, (1 << bits) - 1
    x[1], y[:, 1] = 1 << (bits - 1), 1 << (bits - 1)
    done = product(params, x, y)
    assert len(done.plan.pieces) == 2
    assert done.opened == exact(x, y, bits)
    assert done.uploaded == done.plan.upload_bytes
    assert sum(answers.size for answers in done.answers) == done.plan.download_bytes


@pytest.mark.parametrize("backend", ["compiled", "torch"])
@pytest.mark.parametrize(("m", "n", "columns"), [(1, 1, 1), (7, 13, 41), (40, 3, 64)])
def test_both_backends_are_exact_in_a_small_ring(
    backend: str, m: int, n: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(monkeypatch, backend)
    monkeypatch.setattr(private_evaluate, "STAGE_INPUTS", {"cpu": 16})  # levels of several stages
    x, y = ring((m, n), 51), ring((n, columns), 51)
    assert product(insecure(PRODUCT51), x, y).opened == exact(x, y, 51)


@pytest.mark.gpu
@pytest.mark.parametrize("params", MATMUL_PARAMS, ids=lambda params: params.name)
def test_products_are_exact_on_a_gpu(params: MatmulParams) -> None:
    bits = params.log2_p
    x, y = ring((70, 33), bits), ring((33, 64), bits)
    x[0], y[:, 0] = (1 << bits) - 1, (1 << bits) - 1
    assert product(params, x, y, "cuda").opened == exact(x, y, bits)


def test_pieces_cover_every_column_once() -> None:
    for columns in (1, 8, 12, 13, 100, 1280, 1792, 8191, 8192, 20000):
        pieces = ProductPlan(PRODUCT40, 3, 2, columns).pieces
        covered = [c for piece in pieces for c in range(piece.first, piece.first + piece.count)]
        assert covered == list(range(columns))
        padded = sum(piece.packing.num_slots for piece in pieces)
        assert padded <= max(8, columns + columns // 3 + 8)


# --- misuse -------------------------------------------------------------------------------------


def test_misuse_is_refused() -> None:
    plan = ProductPlan(PRODUCT51, 2, 3, 4)
    (piece,) = plan.pieces
    secret, a_key = BatchSecret.generate(PRODUCT51), os.urandom(32)
    blocks = list(upload(secret, plan, piece, a_key, MAP_INDEX, ring((3, 4), 51)))
    with pytest.raises(SecretReused, match="draw a fresh a_key"):
        next(upload(secret, plan, piece, a_key, MAP_INDEX, ring((3, 4), 51)))
    with pytest.raises(ValueError, match=r"A matrix \(3, 2\) came for a plan"):
        ProductServer(ring((3, 2), 51), plan, piece, a_key, MAP_INDEX)
    server = ProductServer(ring((2, 3), 51), plan, piece, a_key, MAP_INDEX)
    server.add_block(0, torch.from_numpy(blocks[0]))
    with pytest.raises(ProtocolError):
        server.answers()
    with pytest.raises(ProtocolError, match="expected"):
        client_share(secret, plan, piece, np.zeros((1, 5), np.uint8))
    with pytest.raises(ParameterError, match=r"mod 2\^52 cannot be prepared; use .* 51"):
        params_for_bits(52)
    with pytest.raises(ParameterError, match="every side must be at least 1"):
        ProductPlan(PRODUCT40, 0, 3, 4)
    with pytest.raises(ParameterError, match="fewer than 512 elements, not 512; split the inner"):
        ProductPlan(PRODUCT40, 1, 512, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log2_q": 192}, "192-bit modulus; use 128"),
        ({"second_bits": 48}, "51-bit messages and answers of 64 and 48 bits"),
        ({"digit_bits": 0}, "digits of 0 bits; use 1 to 51"),
        ({"flood_shift": 13}, "leaves no room below a 51-bit message; flood less"),
        ({"ring_degree": 4096}, "4096 is 128-bit secure up to 109 bits"),
    ],
)
def test_sets_outside_the_table_or_without_room_are_refused(
    change: dict[str, int], message: str
) -> None:
    with pytest.raises(ParameterError, match=message):
        MatmulParams(**{**vars(PRODUCT51), **change})


# --- noise --------------------------------------------------------------------------------------


def test_distances_and_failures_of_the_models_in_the_documentation() -> None:
    assert [log2_failure(params) < -190 for params in MATMUL_PARAMS] == [True, True]
    plan = ProductPlan(PRODUCT51, 1280, 256, 128)
    one = log2_distance([(plan, 1)])
    assert one == pytest.approx(np.log2(squared_distance(plan)) / 2)
    # 384 products of this shape grow with the square root of their number.
    assert log2_distance([(plan, 384)]) == pytest.approx(one + np.log2(384) / 2)
    assert -43.5 < log2_distance([(plan, 384)]) < -42
    check_preparation([(plan, 384)])
    with pytest.raises(ParameterError, match="prepare fewer positions or layers at a time"):
        check_preparation([(plan, 384 << 6)])


@dataclass
class Left:
    """What one product left in its answers, beside the result."""

    noise: NDArray[np.float64]  # (m, T)
    digits: NDArray[np.int64]  # (m, p)
    errors: NDArray[np.float64]  # of the client, (J, N)

    @property
    def filtered(self) -> float:
        """The matched filter with the sum of digits times errors; one slot to a coefficient."""
        return matched_filter(self.noise, self.digits @ self.errors)


Product51 = Callable[[int, int, int], Left]


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> Product51:
    """Function from m, n and columns to what a product in a small ring leaves."""
    record, params = Unrounded(monkeypatch), insecure(PRODUCT51)

    def make(m: int, n: int, columns: int) -> Left:
        record.forget()
        x = ring((m, n), 51)
        with in_this_thread():  # so that errors come in order
            done = product(params, x, ring((n, columns), 51))
        (piece,) = done.plan.pieces
        noise = record.noise(done.secrets[0], piece.packing, done.client)
        return Left(noise, signed_digits(x, params).numpy(), record.errors(64))

    return make


class TestNoise:
    def test_it_is_the_flooding(self, left: Product51) -> None:
        done = left(64, 5, 64)
        assert abs(done.filtered) < NORMAL_LIMIT
        flooding = 2.0 ** (64 + 11) * np.sqrt(3 / 12)
        assert np.std(done.noise) == pytest.approx(flooding, rel=0.05)

    def test_no_flooding_is_seen(self, left: Product51, monkeypatch: pytest.MonkeyPatch) -> None:
        plant(monkeypatch, lambda secrets: secrets._replace(flood=0 * secrets.flood))
        assert left(64, 5, 64).filtered > NORMAL_LIMIT

    def test_too_little_flooding_is_seen(
        self, left: Product51, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Eight times the noise, which 256 rows bring to 17 standard deviations."""
        plant(monkeypatch, lambda secrets: secrets._replace(flood=secrets.flood >> 56))
        assert left(256, 5, 64).filtered > NORMAL_LIMIT

    @pytest.mark.parametrize("columns", [64, 8])
    def test_without_it_the_rest_is_what_the_bound_counts(
        self, columns: int, left: Product51, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With eight columns, the noise of several outputs adds up in every coefficient."""
        plant(monkeypatch, lambda secrets: secrets._replace(flood=0 * secrets.flood))
        plan = ProductPlan(insecure(PRODUCT51), 64, 5, columns)
        assert (plan.pieces[0].packing.outputs > 1) == (columns == 8)
        noise = left(64, 5, columns).noise
        # The bound is on the norm of all shifts: one for the low bits, and the noise, whose norm is
        # a mean; that of one product varies by about 3 %.
        shift = 2.0**64 * np.sqrt(squared_distance(plan)) / (np.sqrt(2) * 0.756)
        expected = (shift - np.sqrt(noise.size)) * 2.0**11
        assert np.sqrt((noise**2).sum()) == pytest.approx(expected, rel=0.2)


# --- the first part -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["compiled", "torch"])
class TestFirstPart:
    def explained(self, change: int = 0) -> bool:
        """Whether A shows the digits of X, one of them changed by so much."""
        params, x = insecure(PRODUCT51), ring((2, 3), 51)
        done, digits = product(params, x, ring((3, 16), 51)), signed_digits(x, params)
        digits[1, 2] += change
        packing, ones = done.plan.pieces[0].packing, torch.ones(2, dtype=torch.int64)
        return first_part_fits(packing, done.a_key, done.answers[0], digits, ones)

    def test_the_matrix_does_not_explain_it(
        self, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use_backend(monkeypatch, backend)
        assert not self.explained()

    def test_without_re_randomisation_it_confirms_a_guess(
        self, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use_backend(monkeypatch, backend)
        plant(monkeypatch, lambda s: s._replace(ternary=0 * s.ternary))
        assert self.explained()
        assert not self.explained(change=1)


# --- masks --------------------------------------------------------------------------------------


def test_a_repeated_mask_tells_a_product_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products under one mask differ, at the client, by X (Y - Y'); fresh masks hide that."""
    params, x = insecure(PRODUCT51), ring((4, 3), 51)
    y, other = ring((3, 8), 51), ring((3, 8), 51)
    modulus = 1 << 51

    def shows_the_matrix() -> bool:
        one, two = product(params, x, y).client, product(params, x, other).client
        return ((one - two) % modulus).tolist() == exact(x, (y - other) % modulus, 51)

    assert not shows_the_matrix()
    key = fresh_mask_key()
    monkeypatch.setattr(private_matmul, "fresh_mask_key", lambda: key)
    assert shows_the_matrix()


def test_shifts_used_by_the_references_are_negacyclic() -> None:
    """The references of this file stand on these: X^N = -1."""
    assert times([1, 2, 3, 4], power(4, 1)) == [(1 << 128) - 4, 1, 2, 3]
