"""One list of decoder cases on every executor of the private program; its limits and its misuse."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, TOKENS, Case
from checkpoints import relative_error
from model_parties import (
    PassMaterial,
    PassPads,
    PlainModel,
    PrivateModel,
    float_reference,
    insecure_dealer,
    load,
)
from torch import Tensor

from otpipe.errors import UsageError
from otpipe.model import private_maps, private_program
from otpipe.model.private_bundle import BUNDLE_VERSION
from otpipe.model.private_description import (
    EMBEDDED_FORMATS,
    FORMATS,
    LOGITS,
    REVEALED_LOGITS,
    RING_BITS,
)
from otpipe.model.private_maps import ClientMaps, ServerMaps
from otpipe.model.private_program import PrivateProgram, Runner, Stage, stages
from otpipe.model.program import forward
from otpipe.secure import PlainOperations, Share
from otpipe.secure.functions import (
    EXP_BITS,
    EXP_FRAC,
    ZONE_INDEX_BITS,
    _exp_table,
    _octave_table,
    _silu_tail,
)

CaseDirectory = Callable[[Case], Path]
Model = PlainModel | PrivateModel
SHARED_OUT = [case for case in CASES if case.name in ("qwen2_sharded_fp16", "llama_outliers_tied")]


def case_logits(model: Model, case: Case) -> Tensor:
    """Logits of all positions, pass by pass."""
    ends = list(accumulate(case.chunks, initial=0))
    passes = [model.forward(case.token_ids[lo:hi]) for lo, hi in pairwise(ends)]
    return torch.cat([logits for logits in passes if logits is not None])


def check_case(
    case: Case, directory: Path, model_of: Callable[..., Model], report: Callable[..., None]
) -> None:
    """Against the same integer weights in float32."""
    description, weights = load(directory)
    got = case_logits(model_of(description, weights), case)
    reference = float_reference(description, weights)
    want = forward(reference, case.token_ids, reference.new_cache(), "all")
    assert want is not None and got.shape == want.shape
    error = relative_error(got, want)
    report("relative error", error)
    assert error < (2e-2 if "outliers" in case.name else 4e-3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plaintext_integers(
    case: Case, case_directory: CaseDirectory, record_property: Any
) -> None:
    check_case(case, case_directory(case), PlainModel, record_property)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_client_and_server(case: Case, case_directory: CaseDirectory, record_property: Any) -> None:
    check_case(
        case,
        case_directory(case),
        lambda *model: PrivateModel(*model, len(case.token_ids)),
        record_property,
    )


@pytest.mark.parametrize("case", SHARED_OUT, ids=lambda case: case.name)
def test_client_and_two_ranks(
    case: Case, case_directory: CaseDirectory, record_property: Any
) -> None:
    """Three layers end on the first rank, two on the second; shares of the stream move between."""
    check_case(
        case,
        case_directory(case),
        lambda *model: PrivateModel(*model, len(case.token_ids), world_size=2),
        record_property,
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=lambda case: case.name)
def test_with_all_of_the_cryptography(
    case: Case, case_directory: CaseDirectory, record_property: Any
) -> None:
    """RLWE preparation and oblivious transfers; a prompt, then single tokens."""
    short = Case(case.name, case.options, case.token_ids[:8], (5, 1, 1, 1))
    check_case(
        short,
        case_directory(case),
        lambda *model: PrivateModel(*model, 8, transfers="real", preparation="real"),
        record_property,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=lambda case: case.name)
def test_ranks_on_cuda(case: Case, case_directory: CaseDirectory) -> None:
    """The same weights, other kernels; the client stays on the CPU."""
    description, on_cpu = load(case_directory(case))
    same, weights = load(case_directory(case), "cuda")
    assert same == description
    for index, each in weights.items():
        assert torch.equal(each.weight.cpu(), on_cpu[index].weight)
        assert torch.equal(each.multipliers.cpu(), on_cpu[index].multipliers)
    model = PrivateModel(
        description, weights, 8, transfers="real", preparation="real", world_size=2, device="cuda"
    )
    plain = PlainModel(description, on_cpu)
    for first, last in ((0, 5), (5, 6), (6, 8)):
        got = model.forward(case.token_ids[first:last])
        want = plain.forward(case.token_ids[first:last])
        assert got is not None and want is not None
        assert relative_error(got, want) < 4e-3


@pytest.fixture(scope="module")
def tiny(case_directory: CaseDirectory) -> Any:
    return load(case_directory(CASES[0]))


@pytest.mark.parametrize("kind", ["plain", "two_parties"])
def test_logits_for_the_rows_that_are_asked_for(tiny: Any, kind: str) -> None:
    def model() -> Model:
        return PlainModel(*tiny) if kind == "plain" else PrivateModel(*tiny, 8, world_size=2)

    whole = model().forward(TOKENS[:8])
    assert whole is not None and whole.dtype == torch.float32
    other = model()
    assert other.forward(TOKENS[:5], "none") is None
    last = other.forward(TOKENS[5:8], "last")
    assert last is not None and last.shape == (1, 101)
    assert relative_error(last, whole[-1:]) < 4e-3


def test_messages_in_blocks_of_rows(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long passes are cut; rows keep their pads and masks."""
    want = PlainModel(*tiny).forward(TOKENS)
    for module in (private_maps, private_program):
        monkeypatch.setattr(module, "MAX_BLOCK_ELEMENTS", 400)
    for model in (PlainModel(*tiny), PrivateModel(*tiny, len(TOKENS))):
        got = model.forward(TOKENS)
        assert want is not None and got is not None
        assert relative_error(got, want) < 4e-3
    party = model.connections[0]
    assert party.client_end.rounds > 60


def test_stages_cover_every_map_once_and_in_order(tiny: Any) -> None:
    spec = tiny[0].spec
    order = stages(spec)
    assert order[0] == Stage("embed") and order[-1] == Stage("head")
    indices = [index for stage in order for index in stage.map_indices(spec)]
    assert indices == list(range(len(spec.maps)))


class Silent:
    """Pads and a channel that nothing must touch."""

    def take(self, index: int, first_row: int, count: int) -> Any:
        raise AssertionError("nothing may be taken")


@pytest.mark.parametrize(
    ("token_ids", "sentence"),
    [
        ([], "no token to process"),
        ([3, 101], "Token 101 is outside the vocabulary of 101"),
        ([1] * 513, "would reach 513 tokens, but the model has 512"),
    ],
)
def test_what_a_client_cannot_ask_for(tiny: Any, token_ids: list[int], sentence: str) -> None:
    program = PrivateProgram(tiny[0])
    plain = PlainOperations()
    runner = Runner(plain, ClientMaps(plain, tiny[0], Silent()))
    cache = program.new_cache()
    with pytest.raises(UsageError, match=sentence):
        program.forward(lambda _: runner, cache, token_ids)
    assert cache.length == 0


def test_positions_that_the_formats_do_not_hold(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On either side, before anything is sent or received."""
    monkeypatch.setattr(private_program, "FORMATS", FORMATS_OF_SIX)
    model = PrivateModel(*tiny, 8)
    model.forward(TOKENS[:5], "none")
    sentence = "2 tokens after 5 was asked for, but with private weights a text has 1 to 6"
    with pytest.raises(UsageError, match=sentence):
        model.program.forward(
            lambda _: Runner(PlainOperations(), model), model._client_cache, TOKENS[:2]
        )
    server = Runner(PlainOperations(), ServerMaps(PlainOperations(), *tiny, Silent()))
    for count in (2, 0, -1):
        with pytest.raises(UsageError, match=f"{count} tokens after 5"):
            model.program.serve(
                server,
                model._server_caches[0],
                lambda _: True,
                count,
                "last",
                lambda _: pytest.fail("received"),
                lambda _, share: pytest.fail("sent"),
            )


FORMATS_OF_SIX = type(FORMATS)(**(vars(FORMATS) | {"max_positions": 6}))


def test_shares_that_do_not_fit_a_map(tiny: Any) -> None:
    plain = PlainOperations()
    maps = ClientMaps(plain, tiny[0], Silent())
    for share in (
        Share(torch.zeros((1, 48), dtype=torch.int64), 44, 12),
        Share(torch.zeros((1, 48), dtype=torch.int64), 40, 14),
        Share(torch.zeros((1, 47), dtype=torch.int64), 44, 14),
    ):
        with pytest.raises(ValueError, match="Map 1 takes 48 features of 44 bits at frac 14"):
            plain.run(maps.linear(1, share))


def test_no_row_of_a_map_is_taken_twice(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the program asks of pads and masks: the check of the tests' own store is exercised."""
    pads = PassPads({3: insecure_dealer(3, tiny[1][3], 4)}, 1)
    pads.take(3, 0, 2)
    with pytest.raises(AssertionError, match="taken twice"):
        pads.take(3, 1, 1)
    asked: list[tuple[int, int]] = []
    rows = PassMaterial._rows

    def recorded(self: PassMaterial, index: int, first_row: int, count: int) -> slice:
        asked.extend((index, row) for row in range(first_row, first_row + count))
        return rows(self, index, first_row, count)

    monkeypatch.setattr(PassMaterial, "_rows", recorded)
    PrivateModel(*tiny, 3).forward(TOKENS[:3], "last")
    head = len(tiny[0].maps) - 1
    want = sorted([*((i, row) for i in range(head) for row in range(3)), (head, 2)])
    assert sorted(asked) == sorted(want * 2)  # pads and masks


PUBLIC_PROGRAM = {1: "55531be0c36653b5"}
"""By version of the bundle: a digest of what both parties must have alike and no message shows."""


def test_a_change_of_the_public_program_needs_a_new_bundle_version() -> None:
    """Parties with other scales exchange messages of the same sizes, and get garbage unnoticed."""
    formats = {"logits": LOGITS, "revealed": REVEALED_LOGITS}
    for name, each in (("", FORMATS), ("embedded ", EMBEDDED_FORMATS)):
        formats |= {name + key: value for key, value in each.formats().items()}
    facts: list[Any] = [[name, each.bits, each.frac] for name, each in sorted(formats.items())]
    facts += [[FORMATS.rope_frac, FORMATS.context_bits, FORMATS.max_positions, RING_BITS]]
    facts += [[EXP_BITS, EXP_FRAC, ZONE_INDEX_BITS]]
    for table in (_silu_tail(11), _exp_table(12), _octave_table(False, 1.0)):
        facts += [[table.low, table.window_bits, table.index_bits, table.intercept_drop]]
        facts += [[table.raw_drop, table.out_bits, table.out_frac, *table.basis_bits]]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    assert PUBLIC_PROGRAM[BUNDLE_VERSION] == digest, "the parties' programs differ: a new version"
