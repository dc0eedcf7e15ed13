"""What client and server see of a whole pass: nothing that depends on weights, nor on tokens.

The server sees what the client gives it (and, of ideal oblivious transfers, its own masks). The
client sees its prepared results, the results of its transfers, and the shares of the logits. All
must be uniform in their rings and unrelated to each other, whatever the other party holds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import build_checkpoint, relative_error
from model_parties import Material, PrivateModel, load
from torch import Tensor
from views import findings

from otpipe.kernels.ring_gemm import ring_gemm
from otpipe.model.private_description import RING_BITS, PrivateDescription
from otpipe.model.private_weights import PrivateWeights
from otpipe.secure import Party
from otpipe.secure.rounds import Step, Tell
from otpipe.secure.shares import Share, random_ring, reduced

Weights = dict[int, PrivateWeights]
View = list[tuple[Tensor, int]]
TEXT = (5, 80, 3, 41, 17, 66, 29, 9)
ENOUGH = 200
"""Values of a message that its statistics need."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[PrivateDescription, Weights]:
    directory = build_checkpoint(Path(tmp_path_factory.mktemp("tiny")), num_layers=1)
    return load(directory)


def other_weights(description: PrivateDescription, weights: Weights) -> Weights:
    """Other weights of the same function: hidden features of the feed-forward part change places,
    and those that pass through it change signs in the value and output maps."""
    spec = description.spec
    changed = dict(weights)
    order = torch.randperm(spec.intermediate_size)
    both = torch.cat((order, order + spec.intermediate_size))
    index = spec.map_index("gate_up", 0)
    gate_up = weights[index]
    changed[index] = replace(
        gate_up, weight=gate_up.weight[both], multipliers=gate_up.multipliers[both]
    )
    index = spec.map_index("down", 0)
    changed[index] = replace(weights[index], weight=weights[index].weight[:, order])
    flip = torch.ones(spec.q_size + 2 * spec.kv_size, dtype=torch.int8)
    flip[-spec.kv_size :] = -1
    index = spec.map_index("qkv", 0)
    qkv = weights[index]
    assert qkv.bias is not None
    changed[index] = replace(qkv, weight=qkv.weight * flip[:, None], bias=qkv.bias * flip)
    index = spec.map_index("o", 0)
    changed[index] = replace(weights[index], weight=-weights[index].weight)
    return changed


def deal_with_equal_pads(
    index: int, weights: PrivateWeights, num_slots: int, pads: Mapping[int, Tensor] | None = None
) -> Material:
    """As the INSECURE dealer, but one pad for all slots, and the same in every model.

    So what hides the weights in the client's view is the server's masks alone.
    """
    m, n = weights.weight.shape
    generator = torch.Generator().manual_seed(index)
    row = torch.randint(0, 1 << RING_BITS, (1, n), generator=generator)
    pads_Tn = row.expand(num_slots, n)
    masks = random_ring((num_slots, m), RING_BITS, torch.device("cpu"))
    product = ring_gemm(pads_Tn.contiguous(), weights.weight, RING_BITS) * weights.multipliers
    return Material(pads_Tn, reduced(product - masks, RING_BITS), masks)


def client_view(
    description: PrivateDescription,
    weights: Weights,
    monkeypatch: pytest.MonkeyPatch,
    deal: Callable[[int, PrivateWeights, int], Material] = deal_with_equal_pads,
) -> tuple[View, Tensor]:
    """Everything the client receives in preparation and one pass, and its logits."""
    told: View = []
    receive = Party._receive

    def recording(self: Party, label: str, requests: Sequence[tuple[int, object]]) -> object:
        got = receive(self, label, requests)  # type: ignore[arg-type]
        if not self.is_server:
            for (_, values), (_, request) in zip(got, requests, strict=True):
                assert isinstance(request, Tell)
                told.append((values.reshape(-1), request.bits))
        return got

    monkeypatch.setattr(Party, "_receive", recording)
    monkeypatch.setitem(PrivateModel.deal_of, "equal pads", deal)
    parties = PrivateModel(description, weights, len(TEXT), preparation="equal pads")
    logits = parties.forward(TEXT)
    monkeypatch.undo()
    assert logits is not None
    ideal = parties.connections[0].ideal
    assert ideal is not None and len(told) == 1
    # Slots of one output side by side: equal pads give equal results where masks do not differ.
    prepared = [(each.prepared.t().reshape(-1), RING_BITS) for each in parties.material.values()]
    return [*prepared, *told, *ideal.client_learned], logits


def large(view: View) -> View:
    """Messages with as many values as statistics need."""
    return [(values, bits) for values, bits in view if len(values) >= ENOUGH]


def test_the_client_sees_nothing_of_the_weights_but_the_logits(
    model: tuple[PrivateDescription, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models of one function: equal logits, and views that are uniform and unrelated."""
    description, weights = model
    others = other_weights(description, weights)
    view, logits = client_view(description, weights, monkeypatch)
    other_view, other_logits = client_view(description, others, monkeypatch)
    assert relative_error(other_logits, logits) < 4e-3
    assert [(v.shape, bits) for v, bits in view] == [(v.shape, b) for v, b in other_view]
    assert len(large(view)) > 60
    assert all(len(values) >= ENOUGH for values, _ in view[: len(weights) + 1])
    assert findings(large(view)) == [] and findings(large(other_view)) == []
    differences = [
        (reduced(one - other, bits), bits)
        for (one, bits), (other, _) in zip(view, other_view, strict=True)
    ]
    assert findings(large(differences)) == []


def without_masks(index: int, weights: PrivateWeights, num_slots: int) -> Material:
    whole = deal_with_equal_pads(index, weights, num_slots)
    unmasked = reduced(whole.prepared + whole.masks, RING_BITS)
    return Material(whole.pads, unmasked, torch.zeros_like(whole.masks))


def one_mask_for_all_slots(index: int, weights: PrivateWeights, num_slots: int) -> Material:
    whole = deal_with_equal_pads(index, weights, num_slots)
    mask = whole.masks[:1].expand(num_slots, -1)
    prepared = reduced(whole.prepared + whole.masks - mask, RING_BITS)
    return Material(whole.pads, prepared, mask)


@pytest.mark.parametrize("fault", [without_masks, one_mask_for_all_slots])
def test_missing_or_repeated_masks_show(
    fault: Callable[[int, PrivateWeights, int], Material],
    model: tuple[PrivateDescription, Weights],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    view, _ = client_view(*model, monkeypatch, fault)
    assert any("neighbours of result 0" in finding for finding in findings(large(view)))


def server_view(
    model: tuple[PrivateDescription, Weights],
    token_ids: Sequence[int],
    monkeypatch: pytest.MonkeyPatch,
    pads: Callable[[Material], Material] = lambda material: material,
) -> View:
    """Every value that the client gives to the server in one pass."""
    given: View = []
    give = Party.give_to_server

    def recording(self: Party, values: Tensor, bits: int) -> Step[Tensor | None]:
        got = yield from give(self, values, bits)
        if self.is_server:
            assert got is not None
            given.extend((row, bits) for row in got.unbind(0))
        return got

    monkeypatch.setattr(Party, "give_to_server", recording)
    parties = PrivateModel(*model, len(token_ids))
    parties.material = {index: pads(each) for index, each in parties.material.items()}
    parties.forward(token_ids)
    monkeypatch.undo()
    return given


def wide(view: View) -> View:
    """Rows of one map are joined: a row of the tiny model is too short for statistics."""
    joined: dict[int, list[Tensor]] = {}
    for row, _ in view:
        joined.setdefault(len(row), []).append(row)
    return [(torch.cat(rows), RING_BITS) for rows in joined.values()]


def test_the_server_sees_nothing_of_the_tokens(
    model: tuple[PrivateDescription, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token all the time, and another text: as many messages, uniform and unrelated."""
    views = [server_view(model, text, monkeypatch) for text in ((7,) * 8, TEXT)]
    sizes = [[len(row) for row, _ in view] for view in views]
    assert sizes[0] == sizes[1]
    for view in map(wide, views):
        assert len(view) >= 3 and findings(view) == []
    differences = [
        (reduced(one - other, RING_BITS), RING_BITS)
        for (one, _), (other, _) in zip(*map(wide, views), strict=True)
    ]
    assert findings(differences) == []


def no_pads(material: Material) -> Material:
    return Material(torch.zeros_like(material.pads), material.prepared, material.masks)


def short_pads(material: Material) -> Material:
    return replace(material, pads=material.pads >> 4)


@pytest.mark.parametrize("fault", [no_pads, short_pads])
def test_missing_or_short_pads_show(
    fault: Callable[[Material], Material],
    model: tuple[PrivateDescription, Weights],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert findings(wide(server_view(model, (7,) * 8, monkeypatch, fault)))


def test_the_embeddings_message_fits_every_token(
    model: tuple[PrivateDescription, Weights],
) -> None:
    """One message, one server's answer: for each token there is a pad that explains both."""
    description, weights = model
    vocab = description.spec.vocab_size
    message = np.frombuffer(os.urandom(8 * vocab), np.int64) & ((1 << RING_BITS) - 1)
    d = torch.from_numpy(message.copy())
    table = weights[0].weight.t().long()
    for token in (0, 7, vocab - 1):
        one_hot = torch.zeros(vocab, dtype=torch.int64)
        one_hot[token] = 1
        pad = reduced(one_hot - d, RING_BITS)
        seen = reduced(one_hot - pad, RING_BITS)
        assert torch.equal(seen, d)
        product = ring_gemm(torch.stack((d, pad)), weights[0].weight, RING_BITS)
        row = Share.of(product.sum(0), RING_BITS)
        assert torch.equal(row.data, Share.of(table[token], RING_BITS).data)
