"""Memory that sessions of a rank may hold together."""

from __future__ import annotations

from otpipe.server.memory_budget import MemoryBudget

ONE, TWO = b"1", b"2"


def test_a_promise_is_kept_within_the_limit_and_can_shrink_and_end() -> None:
    memory = MemoryBudget(100)
    assert memory.resize(ONE, 60)
    assert not memory.resize(TWO, 41)
    assert memory.held_bytes == 60, "what was refused is not held"
    assert memory.resize(TWO, 40)
    assert not memory.resize(ONE, 61)
    assert memory.resize(ONE, 30)
    assert memory.resize(TWO, 70)
    memory.free(TWO)
    memory.free(TWO)
    assert memory.held_bytes == 30


def test_what_is_held_can_shrink_above_a_limit_that_was_lowered() -> None:
    memory = MemoryBudget(100)
    assert memory.resize(ONE, 90)
    memory.limit_bytes = 10
    assert memory.resize(ONE, 80)
    assert not memory.resize(ONE, 81)
