"""The lock of one model's pad store, and the note that says who holds it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from filelock import FileLock, Timeout

from otpipe.client.store_files import write_private
from otpipe.errors import StoreLocked

_LOCK_NAME = "lock"
_HOLDER_NAME = "holder.json"


class StoreLock:
    """Held from construction to ``release``. Raises StoreLocked, OSError.

    It is a file with a name and can be deleted, so it does not protect the pads alone: each batch
    holds a lock on its counter file too.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = FileLock(directory / _LOCK_NAME, timeout=0, mode=0o600, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise self.refusal() from None

    def refusal(self) -> StoreLocked:
        return StoreLocked(
            f"the pad store {self._directory} is in use by {self._holder()}; two processes must "
            "not draw from the same pads: end that process, or use another store directory"
        )

    def _holder(self) -> str:
        try:
            return (
                f"process {int(json.loads((self._directory / _HOLDER_NAME).read_bytes())['pid'])}"
            )
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def sign(self) -> None:
        """Note who holds the store; only when the locks of the batches are ours too."""
        temporary = self._directory / f"{_HOLDER_NAME}.new"
        temporary.unlink(missing_ok=True)
        holder = json.dumps({"pid": os.getpid(), "since": time.time()}).encode()
        write_private(temporary, holder)
        temporary.replace(self._directory / _HOLDER_NAME)

    def release(self) -> None:
        self._lock.release()
