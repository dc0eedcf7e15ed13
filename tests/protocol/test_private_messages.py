"""The slots that a PASS names: bounded, as many as its rows, and the same on both sides."""

from __future__ import annotations

import pytest

from otpipe.errors import ProtocolError
from otpipe.protocol.private_messages import (
    MAX_PASS_SPANS,
    Pass,
    SlotSpan,
    parse_spans,
    spans_bytes,
    spans_payload,
)

SPANS = (SlotSpan(b"a" * 16, 5, 2), SlotSpan(b"b" * 16, 0, 1))


def request(rows: int, spans: int) -> Pass:
    return Pass(number=0, position=0, rows=rows, logits_for=1, spans=spans)


def test_spans_travel_unchanged() -> None:
    payload = spans_payload(SPANS)
    assert len(payload) == spans_bytes(request(3, 2)) == 48
    assert parse_spans(request(3, 2), payload) == SPANS


@pytest.mark.parametrize("rows", [0, 2, 4])
def test_slots_that_are_not_the_rows_are_refused(rows: int) -> None:
    with pytest.raises(ProtocolError, match="rows named"):
        parse_spans(request(rows, 2), spans_payload(SPANS))


def test_an_empty_span_is_refused() -> None:
    spans = (SlotSpan(b"a" * 16, 0, 3), SlotSpan(b"b" * 16, 0, 0))
    with pytest.raises(ProtocolError, match=r"rows named \[3, 0\] slots"):
        parse_spans(request(3, 2), spans_payload(spans))


@pytest.mark.parametrize("spans", [0, MAX_PASS_SPANS + 1])
def test_a_number_of_spans_is_checked_before_their_bytes_are_read(spans: int) -> None:
    with pytest.raises(ProtocolError, match=f"named {spans} runs of slots"):
        spans_bytes(request(3, spans))
