"""Writing back early, so that a commit at the end does not wait for everything at once."""

from __future__ import annotations

import os
import threading

PERIOD_BYTES = 1 << 30
"""Written between two synchronisations."""


class EarlySync:
    """Synchronises a file in the background after every gigabyte. For any number of threads."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._unsynced_bytes = 0
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def written(self, num_bytes: int) -> None:
        """Count what was written, and begin a synchronisation when one is due."""
        with self._lock:
            self._unsynced_bytes += num_bytes
            busy = self._thread is not None and self._thread.is_alive()
            if busy or self._unsynced_bytes < PERIOD_BYTES:
                return
            self._unsynced_bytes = 0
            self._thread = threading.Thread(target=self._sync, name="sync pads", daemon=True)
            self._thread.start()

    def _sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            self._error = error

    def wait(self) -> None:
        """Let a synchronisation that is under way end; the file may be closed after that."""
        if self._thread is not None:
            self._thread.join()

    def finish(self) -> None:
        """``wait``, and raise what went wrong: the system reports a failed write-back only once."""
        self.wait()
        if self._error is not None:
            raise self._error
