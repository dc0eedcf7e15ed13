"""One lane per rank: jobs of several clients for the same map become one GEMM.

Flat combining (Hendler, Incze, Shavit, Tzafrir, SPAA 2010): every client thread queues its rows and
then asks for the lane's lock; whoever gets it does all that is queued, and the others find their
rows done. A single client pays no thread hand-over, and several are grouped without a timer.
Different lanes run at once, so that several ranks are busy with different clients.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from otpipe.errors import ServerRefused
from otpipe.pipeline.bulk import BULK_BYTES
from otpipe.pipeline.jobs import EMPTY, JobHeader, Op
from otpipe.server.turns import Turns

RankCall = Callable[[JobHeader, Tensor], tuple[JobHeader, Tensor]]
"""Do one job on the lane's rank: directly for the gateway's own, over the transport for others."""

MAX_OLE_SESSIONS_PER_RANK = 8
"""Preprocessing sessions that may hold memory on one rank at a time; further ones wait."""


@dataclass(slots=True, eq=False)
class _LinearJob:
    map_index: int
    rows: int
    payload: Tensor  # uint8 (bytes,)
    result: Tensor | None = None
    error: BaseException | None = None

    @property
    def finished(self) -> bool:
        return self.result is not None or self.error is not None


class Lane:
    """All traffic with one rank."""

    def __init__(
        self, rank: int, rank_call: RankCall, max_rows: Sequence[int], side_by_side: bool = False
    ) -> None:
        """Make a lane.

        Args:
            max_rows: most rows of one request, by map; grouped clients share that limit.
            side_by_side: bulk requests may run at once; for this process's own CUDA device.
        """
        self.rank = rank
        self._side_by_side = side_by_side
        self._max_rows = max_rows
        self.ole_turns = Turns(MAX_OLE_SESSIONS_PER_RANK)
        self._rank_call = rank_call
        self._busy = threading.Lock()
        self._pending: deque[_LinearJob] = deque()
        self._sessions = 0

    def linear(self, map_index: int, rows: int, payload: Tensor) -> Tensor:
        """W (x - r) for one client's rows, grouped with whatever else waits for this rank.

        Args:
            payload: uint8 (rows * n * ring_bytes,) CPU.

        Returns:
            uint8 (rows * m * ring_bytes,) CPU.
        """
        if self._side_by_side and payload.numel() >= BULK_BYTES:
            return self._checked_call(JobHeader(Op.LINEAR, map_index, rows), payload)[1]
        if self._busy.acquire(blocking=False):  # nobody waits: no queue
            try:
                return self._run_rows(map_index, rows, payload)
            finally:
                self._busy.release()
        job = _LinearJob(map_index, rows, payload)
        self._pending.append(job)
        with self._busy:
            if not job.finished:
                self._run_pending()
        if job.error is not None:
            raise job.error
        assert job.result is not None
        return job.result

    def call(self, header: JobHeader, payload: Tensor = EMPTY) -> tuple[JobHeader, Tensor]:
        """One job on the rank, alone.

        Raises:
            ServerRefused: the rank answered with an error; its sentence is the message.
            RankDied: the rank is gone.
        """
        with self._busy:
            return self._checked_call(header, payload)

    def new_session(self) -> int:
        """A preprocessing session number that this rank has not seen."""
        with self._busy:
            self._sessions += 1
            return self._sessions

    def _checked_call(self, header: JobHeader, payload: Tensor) -> tuple[JobHeader, Tensor]:
        answer, result = self._rank_call(header, payload)
        if answer.op == Op.FAILED:
            raise ServerRefused(bytes(result.cpu().numpy()).decode(errors="replace"))
        return answer, result

    def _run_pending(self) -> None:
        """Do everything queued now; runs under the lock."""
        groups: dict[int, list[_LinearJob]] = {}
        for _ in range(len(self._pending)):
            job = self._pending.popleft()
            groups.setdefault(job.map_index, []).append(job)
        for jobs in groups.values():
            while jobs:
                group = _take_group(jobs, self._max_rows[jobs[0].map_index])
                try:
                    self._run_group(group)
                except BaseException as error:
                    for job in group:
                        job.error = error

    def _run_group(self, group: list[_LinearJob]) -> None:
        payload = group[0].payload if len(group) == 1 else torch.cat([j.payload for j in group])
        rows = sum(job.rows for job in group)
        result = self._run_rows(group[0].map_index, rows, payload)
        bytes_per_row = result.numel() // rows
        for job, piece in zip(
            group, result.split([job.rows * bytes_per_row for job in group]), strict=True
        ):
            job.result = piece

    def _run_rows(self, map_index: int, rows: int, payload: Tensor) -> Tensor:
        """One job; runs under the lock."""
        _, result = self._checked_call(JobHeader(Op.LINEAR, map_index, rows), payload)
        return result.cpu() if result.is_cuda else result


def _take_group(jobs: list[_LinearJob], max_rows: int) -> list[_LinearJob]:
    """Remove from ``jobs`` as many as fit one request of the allowed size."""
    rows = 0
    for count, job in enumerate(jobs):
        rows += job.rows
        if count and rows > max_rows:
            group = jobs[:count]
            del jobs[:count]
            return group
    group = jobs[:]
    jobs.clear()
    return group
