"""Places are taken in the order of asking, and nobody who has left holds one."""

from __future__ import annotations

import threading

import pytest
from raw_client import eventually

from otpipe.server import turns
from otpipe.server.turns import Turns


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "POLL_S", 0.02)


class Waiting:
    """Somebody in line, in a thread."""

    def __init__(self, line: Turns, order: list[int], number: int) -> None:
        self.has_left = False
        self.got: bool | None = None
        self._line, self._order, self._number = line, order, number
        before = line.waiting
        self.thread = threading.Thread(target=self._wait, daemon=True)
        self.thread.start()
        assert eventually(lambda: line.waiting == before + 1)

    def _wait(self) -> None:
        self.got = self._line.take(lambda: self.has_left)
        if self.got:
            self._order.append(self._number)


def test_in_the_order_of_asking() -> None:
    line, order = Turns(2), []
    assert line.take(lambda: True) and line.take(lambda: True)  # nobody is asked who need not wait
    assert line.free == 0
    waiting = [Waiting(line, order, i) for i in range(4)]
    for i, who in enumerate(waiting):
        line.give_back()
        who.thread.join(5)
        assert order == list(range(i + 1))
    assert line.free == line.waiting == 0
    line.give_back()
    line.give_back()
    assert line.free == 2


def test_who_leaves_is_passed_over() -> None:
    line, order = Turns(1), []
    assert line.take(lambda: False)
    waiting = [Waiting(line, order, i) for i in range(3)]
    waiting[0].has_left = True
    waiting[0].thread.join(5)
    assert waiting[0].got is False and line.waiting == 2
    line.give_back()
    waiting[1].thread.join(5)
    assert order == [1]
    line.give_back()
    waiting[2].thread.join(5)
    assert order == [1, 2]


def test_a_turn_that_comes_while_its_owner_leaves_is_given_on() -> None:
    line = Turns(1)
    assert line.take(lambda: False)

    def leave() -> bool:
        line.give_back()  # its turn, in the very moment it is found gone
        return True

    assert not line.take(leave)
    assert line.free == 1


def test_a_place_is_given_back_once() -> None:
    line = Turns(1)
    with pytest.raises(AssertionError, match="given back twice"):
        line.give_back()
