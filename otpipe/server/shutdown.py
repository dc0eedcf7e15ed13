"""The one way in which a rank's process ends, whoever asks for it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

log = logging.getLogger("otpipe.serve")

EXIT_USAGE = 2
EXIT_RANK_DIED = 70
SIGNAL_GRACE_S = 0.5
"""torchrun signals all ranks when one has died: time for liveness to say which one it was."""

ECHO_PATIENCE_S = 5.0
"""How long a rank waits, before it says what another is about to say, for torchrun to stop it."""


class Shutdown:
    """Where any thread asks for the end, and the main thread waits for it.

    The main thread does nothing else, so that it handles signals even while another thread is
    blocked in a collective.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._launcher_pid = os.getppid()
        self._asked = threading.Event()
        self._signalled = threading.Event()
        self._lock = threading.Lock()
        self._at_end: list[Callable[[], None]] = []
        self._exit_code = 0
        self._sentence = ""
        self._first_speaker = rank

    def ask(self, exit_code: int, sentence: str, first_speaker: int | None = None) -> None:
        """End with this code and sentence, unless something else asked first.

        Args:
            sentence: said on stderr; "" says nothing.
            first_speaker: where every rank has the same to say, the lowest rank that says it at
                once; those above hold their tongue if they are stopped soon. None: this rank.
        """
        with self._lock:
            if not self._asked.is_set():
                self._exit_code, self._sentence = exit_code, sentence
                self._first_speaker = self._rank if first_speaker is None else first_speaker
                self._asked.set()

    def at_end(self, callback: Callable[[], None]) -> None:
        """Have the main thread call this on the way out; the latest comes first."""
        self._at_end.append(callback)

    def install(self) -> None:
        """Handle SIGTERM and SIGINT from now on. For the main thread."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def wait(self) -> NoReturn:
        """Wait until someone asks for the end, or whoever started this process is gone; end."""
        while not self._asked.wait(0.5):  # in slices, so that signals are handled on any system
            if os.getppid() != self._launcher_pid:
                # Nobody could restart this rank, or tell it to stop: do not keep port and GPU.
                self.ask(
                    EXIT_RANK_DIED,
                    f"rank {self._rank} ends: torchrun (pid {self._launcher_pid}) is gone; start "
                    "the server again",
                )
        sentence = self._sentence
        if sentence and self._rank > self._first_speaker and self._signalled.wait(ECHO_PATIENCE_S):
            sentence = ""
        for callback in reversed(self._at_end):
            try:
                callback()
            except Exception:
                log.exception("on the way out")
        if sentence:
            print(f"otpipe: {sentence}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # Threads may be blocked in a collective that will never return: do not wait for them.
        os._exit(self._exit_code)

    def _on_signal(self, number: int, _frame: object) -> None:
        self._signalled.set()
        sentence = f"stopped by {signal.Signals(number).name}" if self._rank == 0 else ""
        timer = threading.Timer(SIGNAL_GRACE_S, self.ask, (0, sentence))
        timer.daemon = True
        timer.start()
