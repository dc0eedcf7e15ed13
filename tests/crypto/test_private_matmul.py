"""Products of two parties' matrices ahead of time: exact, of the sizes computed, and hidden."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import private_helpers
import pytest
import torch
from numpy.typing import NDArray
from private_helpers import (
    centred,
    from_digits,
    integers,
    linear_answers,
    power,
    times,
    times_secret,
)
from torch import Tensor

from otpipe.crypto import private_matmul, private_rlwe, private_secrets
from otpipe.crypto.private_backend import Backend
from otpipe.crypto.private_matmul import (
    MATMUL_PARAMS,
    MatmulParams,
    Piece,
    ProductPlan,
    ProductServer,
    client_share,
    levels_of,
    params_for_bits,
    signed_digits,
    upload,
)
from otpipe.crypto.private_matmul_backend import WideCompiledBackend, WideTorchBackend
from otpipe.crypto.private_matmul_noise import check_preparation, log2_distance, squared_distance
from otpipe.crypto.private_noise import log2_failure
from otpipe.crypto.private_params import PrivatePacking
from otpipe.crypto.private_secrets import AnswerSecrets, draw_secrets, fresh_mask_key
from otpipe.crypto.randomness import random_bytes
from otpipe.crypto.rlwe import BatchSecret, SecretReused, expand_a
from otpipe.errors import ParameterError, ProtocolError
from otpipe.kernels import wide
from otpipe.kernels.cpu import in_this_thread

PRODUCT40, PRODUCT51 = MATMUL_PARAMS
INDEX = 5
Fault = Callable[[AnswerSecrets], AnswerSecrets]


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
    for index, piece in enumerate(plan.pieces, INDEX):
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


def use_backend(monkeypatch: pytest.MonkeyPatch, kind: type[Backend]) -> None:
    name = "torch" if issubclass(kind, WideTorchBackend) else "compiled"
    private_helpers.use_backend(monkeypatch, name)  # makes the planes, in the layout of its kind
    monkeypatch.setattr(private_matmul, "wide_backend", lambda packing, device: kind(packing))


class TorchOnCpu(WideTorchBackend):
    """What CUDA runs, on the CPU."""

    def __init__(self, packing: PrivatePacking) -> None:
        super().__init__(packing, torch.device("cpu"))


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


@pytest.mark.parametrize("kind", [WideCompiledBackend, TorchOnCpu])
@pytest.mark.parametrize(("m", "n", "columns"), [(1, 1, 1), (7, 13, 41), (40, 3, 64)])
def test_both_backends_are_exact_in_a_small_ring(
    kind: type[Backend], m: int, n: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(monkeypatch, kind)
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
    blocks = list(upload(secret, plan, piece, a_key, INDEX, ring((3, 4), 51)))
    with pytest.raises(SecretReused, match="draw a fresh a_key"):
        next(upload(secret, plan, piece, a_key, INDEX, ring((3, 4), 51)))
    with pytest.raises(ValueError, match=r"A matrix \(3, 2\) came for a plan"):
        ProductServer(ring((3, 2), 51), plan, piece, a_key, INDEX)
    server = ProductServer(ring((2, 3), 51), plan, piece, a_key, INDEX)
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
        ({"log2_q": 192}, "128 bits, increasing ones"),
        ({"second_bits": 48}, "51, 64 and 48 bits"),
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
class Unrounded:
    """What one product left before rounding, float64 (m, T)."""

    noise: NDArray[np.float64]  # B - A t - Delta * result
    guess: NDArray[np.float64]  # sum of digits times the client's errors


def matched_filter(left: Unrounded) -> float:
    """Correlation of noise and guess, in standard deviations of chance."""
    noise, guess = left.noise - left.noise.mean(), left.guess - left.guess.mean()
    return float((noise * guess).sum() / np.sqrt((noise**2).mean() * (guess**2).sum()))


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Unrounded]:
    """One product in a small ring; one slot a coefficient, so that packing adds nothing up."""
    params, m, n = insecure(PRODUCT51), 64, 5
    use_backend(monkeypatch, TorchOnCpu)
    seen: list[tuple[Tensor, Tensor]] = []
    errors: list[NDArray[np.int8]] = []
    rounded, sampled = WideTorchBackend.rounded, private_rlwe.centered_binomial

    def recorded(self: WideTorchBackend, first: Tensor, second: Tensor) -> Tensor:
        seen.append((first, second))
        return rounded(self, first, second)

    def known_errors(count: int, eta: int) -> NDArray[np.int8]:
        errors.append(sampled(count, eta))
        return errors[-1]

    monkeypatch.setattr(WideTorchBackend, "rounded", recorded)
    monkeypatch.setattr(private_rlwe, "centered_binomial", known_errors)

    def make() -> Unrounded:
        seen.clear()
        errors.clear()
        x, y = ring((m, n), 51), ring((n, 64), 51)
        with in_this_thread():  # so that errors come in order
            done = product(params, x, y)
        first, second = (torch.cat(parts, 1) for parts in zip(*seen, strict=True))
        delta = done.client << (128 - 51 - 64)
        known = times_secret(first, done.secrets[0])
        known = wide.add_(known, torch.stack([torch.zeros_like(delta), delta]))
        left = wide.add_(second.view(2, m, 64).clone(), wide.negated(known))
        noise = np.array([[float(centred(value)) for value in row] for row in integers(left)])
        error = np.concatenate(errors).reshape(-1, 64)[1:].astype(np.float64)
        return Unrounded(noise, signed_digits(x, params).numpy() @ error)

    return make


def plant(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Draw secrets as usual, then spoil them."""

    def broken(packing: PrivatePacking, out: AnswerSecrets) -> None:
        draw_secrets(packing, out)
        for field, spoiled in zip(out, fault(out), strict=True):
            field[:] = spoiled

    monkeypatch.setattr(private_secrets, "draw_secrets", broken)


class TestNoise:
    def test_it_is_the_flooding(self, unrounded: Callable[[], Unrounded]) -> None:
        left = unrounded()
        assert abs(matched_filter(left)) < 6
        flooding = 2.0 ** (64 + 11) * np.sqrt(3 / 12)
        assert np.std(left.noise) == pytest.approx(flooding, rel=0.05)

    def test_no_flooding_is_seen_and_is_what_the_bound_counts(
        self, unrounded: Callable[[], Unrounded], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plant(monkeypatch, lambda secrets: secrets._replace(flood=0 * secrets.flood))
        left = unrounded()
        assert matched_filter(left) > 6
        plan = ProductPlan(insecure(PRODUCT51), 64, 5, 64)
        shift = 2.0**64 * np.sqrt(squared_distance(plan)) / (np.sqrt(2) * 0.756)
        # The bound is on the norm of all shifts, the rounding of the low bits included.
        energy = np.sqrt((left.noise**2).sum()) / 2.0**11
        assert 0.7 * (shift - 64) < energy < shift

    def test_too_little_flooding_is_seen(
        self, unrounded: Callable[[], Unrounded], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plant(monkeypatch, lambda secrets: secrets._replace(flood=secrets.flood >> 56))
        assert matched_filter(unrounded()) > 6


# --- the first part -----------------------------------------------------------------------------


def explains(done: Product, piece: Piece, guess: Tensor) -> bool:
    """Whether A is what these digits (m, p) make of the public polynomials, up to small errors."""
    params, packing = done.plan.params, piece.packing
    count = packing.num_polynomials(done.plan.inputs)
    public = from_digits(expand_a(done.a_key, INDEX, 0, count, params))
    ones = torch.ones(len(guess), dtype=torch.int64)
    linear = linear_answers(packing, guess, ones, public[1:])
    got = done.answers[0][:, : params.ring_degree * 8].copy().view(np.uint64)
    off = (
        centred(int(a) - ((want + (1 << 63)) >> 64), 1 << 64)
        for row, known in zip(got, linear, strict=True)
        for a, want in zip(row, known, strict=True)
    )
    return all(abs(value) <= 1 for value in off)


class TestFirstPart:
    def run(self) -> tuple[Product, Tensor]:
        params = insecure(PRODUCT51)
        x = ring((2, 3), 51)
        return product(params, x, ring((3, 16), 51)), signed_digits(x, params)

    @pytest.mark.parametrize("kind", [WideCompiledBackend, TorchOnCpu])
    def test_the_matrix_does_not_explain_it(
        self, kind: type[Backend], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use_backend(monkeypatch, kind)
        done, digits = self.run()
        assert not explains(done, done.plan.pieces[0], digits)

    @pytest.mark.parametrize("kind", [WideCompiledBackend, TorchOnCpu])
    def test_without_re_randomisation_a_guess_is_confirmed(
        self, kind: type[Backend], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use_backend(monkeypatch, kind)
        plant(monkeypatch, lambda s: s._replace(ternary=0 * s.ternary))
        done, digits = self.run()
        assert explains(done, done.plan.pieces[0], digits)
        digits[1, 2] += 1
        assert not explains(done, done.plan.pieces[0], digits)


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
