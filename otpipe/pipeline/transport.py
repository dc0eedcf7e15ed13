"""The one module in which a tensor crosses from rank to rank.

One process group, made once. Job headers always travel over gloo (a rank that waits for work then
sleeps in the kernel instead of spinning on its GPU). Payloads travel

* ``nccl``: device to device with NCCL send/recv, the CUDA tensor as it is;
* ``gloo``: through host memory, pinned when the device is a GPU.

A gloo message whose receive has not been posted yet costs a rendezvous of two more hops. So a
receive is always posted before its message is sent, and a payload of up to 1 MiB shares one message
with its header (gloo delivers a message that is shorter than the posted buffer). A send is not
waited for: gloo completes it in a thread of its own, and waking up for that costs several times the
message. The answer, or the next job, shows that it arrived; until then the tensors are kept.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from otpipe.errors import RankDied, UsageError
from otpipe.pipeline.jobs import EMPTY, HEADER_BYTES, JobHeader

TransportKind = Literal["gloo", "nccl"]

# A rank may wait for its next job for as long as no client comes. Dead peers are noticed by
# pipeline/liveness.py within seconds, not by this timeout.
IDLE_TIMEOUT = timedelta(days=365)

_TAG = 0
_HAND_OVER_TAG = 1
_INLINE_BYTES = 1 << 20

Answer = tuple[JobHeader, Tensor]


def choose_transport(device: torch.device, wanted: str = "auto") -> TransportKind:
    """NCCL on CUDA and gloo on CPU, unless the user chose.

    Raises:
        UsageError: NCCL was asked for without a CUDA device.
    """
    if wanted == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    if wanted == "nccl" and device.type != "cuda":
        raise UsageError(
            f"--transport nccl needs CUDA devices, and this rank runs on {device}; "
            "use --transport gloo"
        )
    if wanted not in ("gloo", "nccl"):
        raise UsageError(f"--transport is {wanted!r}; use auto, gloo or nccl")
    return "nccl" if wanted == "nccl" else "gloo"


def _copied(payload: Tensor) -> Tensor:
    """A copy by this thread alone: torch wakes its thread pool for more than 32 KiB, which takes
    longer than the copy, and milliseconds where the cores are busy."""
    return torch.from_numpy(payload.numpy().copy())


class Transport:
    """Send and receive jobs between ranks.

    Calls for different peers may run in different threads; calls for one peer must not overlap.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device, kind: TransportKind):
        """Join the process group; blocks until all ranks have.

        ``MASTER_ADDR`` and ``MASTER_PORT`` come from torchrun.
        """
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.kind = kind
        if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost", "::1"):
            # Without this gloo binds to whatever the host name resolves to.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "cpu:gloo,cuda:nccl" if kind == "nccl" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=IDLE_TIMEOUT)
        group = dist.group.WORLD
        assert group is not None, "init_process_group made the group"
        self._group = group
        self._sent: dict[int, list[tuple[dist.Work, Tensor]]] = {}
        self._hand_over_lock = threading.Lock()
        # A tensor and the same memory as bytes, one pair a peer and direction.
        self._inboxes = {peer: self._message_buffer() for peer in range(world_size)}
        self._outboxes = {peer: self._message_buffer() for peer in range(world_size)}
        if kind == "nccl":
            # Creates the communicator now, so that a broken fabric shows before "ready".
            probe = torch.ones(1, device=device)
            dist.all_reduce(probe)
            if int(probe.item()) != world_size:
                raise RankDied(
                    f"NCCL summed {probe.item()} over {world_size} ranks; check the GPU links, "
                    "or start with --transport gloo"
                )
        else:
            dist.barrier()

    @property
    def store(self) -> dist.Store:
        """The rendezvous store, for start-up facts that are strings."""
        return dist.distributed_c10d._get_default_store()

    def call(
        self, peer: int, header: JobHeader, payload: Tensor = EMPTY
    ) -> tuple[JobHeader, Tensor]:
        """Have ``peer`` do one job and return its answer.

        Args:
            payload: uint8 (bytes,), on any device.

        Returns:
            The answer's header and payload, uint8 (bytes,), which the caller owns.

        Raises:
            RankDied: the peer is gone.
        """
        try:
            posted = self._post(peer)
            self._send(peer, header, payload)
            answer, result = self._finish(peer, posted)
            return answer, _copied(result) if self._is_inbox(peer, result) else result
        except RuntimeError as error:
            raise RankDied(f"rank {peer} gave no answer: {error}") from error

    def serve(self, peer: int, handle: Callable[[JobHeader, Tensor], Answer]) -> NoReturn:
        """Do the jobs of ``peer`` one after the other, for as long as it lives.

        Raises:
            RankDied: the peer is gone.
        """
        try:
            posted = self._post(peer)
            while True:
                job, payload = self._finish(peer, posted)
                answer, result = handle(job, payload)
                posted = self._post(peer)
                self._send(peer, answer, result)
        except RuntimeError as error:
            raise RankDied(f"rank {peer} sent no job: {error}") from error

    # -- from rank to rank -----------------------------------------------------------------------

    def hand_over(self, peer: int, header: JobHeader, payload: Tensor) -> None:
        """Give ``peer`` a share of a residual stream; for any thread.

        Always over gloo and through host memory, also beside NCCL: NCCL knows no tags, so what two
        ranks send each other in different threads could wait for each other for ever. A share is
        some kilobytes a row.

        Args:
            payload: uint8 (bytes,), on any device, at least one.

        Raises:
            RankDied: the peer is gone.
        """
        message = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        header.write(memoryview(message.numpy()), payload.numel())  # type: ignore[arg-type]
        try:
            with self._hand_over_lock:
                for part in (message, payload.cpu().contiguous()):
                    self._group.send([part], peer, _HAND_OVER_TAG).wait()
        except RuntimeError as error:
            raise RankDied(f"rank {peer} took no share: {error}") from error

    def take_over(self, peer: int, deliver: Callable[[JobHeader, Tensor], None]) -> NoReturn:
        """Receive what ``peer`` hands over, for as long as it lives.

        Args:
            deliver: gets each header and payload, uint8 (bytes,) on the CPU.

        Raises:
            RankDied: the peer is gone.
        """
        message = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        try:
            while True:
                self._group.recv([message], peer, _HAND_OVER_TAG).wait()
                header = JobHeader.read(memoryview(message.numpy()))  # type: ignore[arg-type]
                payload = torch.empty(header.payload_bytes, dtype=torch.uint8)
                self._group.recv([payload], peer, _HAND_OVER_TAG).wait()
                deliver(header, payload)
        except RuntimeError as error:
            raise RankDied(f"rank {peer} handed nothing over: {error}") from error

    # -- messages --------------------------------------------------------------------------------

    def _post(self, peer: int) -> dist.Work:
        """Post the receive of the next message of ``peer``."""
        return self._group.recv([self._inboxes[peer][0]], peer, _TAG)

    def _finish(self, peer: int, posted: dist.Work) -> tuple[JobHeader, Tensor]:
        """Wait for a posted receive, and for the payload if that comes apart."""
        posted.wait()
        inbox, raw = self._inboxes[peer]
        header = JobHeader.read(raw)
        num_bytes = header.payload_bytes
        if num_bytes == 0:
            return header, EMPTY
        if self._is_inline(num_bytes):
            return header, inbox[HEADER_BYTES : HEADER_BYTES + num_bytes]
        if self.kind == "nccl":
            payload = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        else:
            payload = self._host_buffer(num_bytes)
        self._group.recv([payload], peer, _TAG).wait()
        return header, payload

    def _send(self, peer: int, header: JobHeader, payload: Tensor) -> None:
        """Start the send of one message. The previous one to ``peer`` has arrived: see the top."""
        num_bytes = payload.numel()
        outbox, raw = self._outboxes[peer]
        header.write(raw, num_bytes)
        end = HEADER_BYTES
        inline = self._is_inline(num_bytes)
        if num_bytes and inline:
            end += num_bytes
            raw[HEADER_BYTES:end] = memoryview(payload.cpu().numpy())  # type: ignore[arg-type]
        self._sent[peer] = [self._start_send(peer, outbox[:end])]
        if not inline:
            self._sent[peer].append(self._start_send(peer, self._outgoing(payload)))

    def _start_send(self, peer: int, message: Tensor) -> tuple[dist.Work, Tensor]:
        work = self._group.send([message], peer, _TAG)
        if message.is_cuda:
            work.wait()  # orders the stream; does not block the process
        return work, message

    def _is_inline(self, num_bytes: int) -> bool:
        return num_bytes == 0 or (self.kind == "gloo" and num_bytes <= _INLINE_BYTES)

    def _is_inbox(self, peer: int, payload: Tensor) -> bool:
        inbox, _ = self._inboxes[peer]
        return payload.numel() > 0 and (
            payload.untyped_storage().data_ptr() == inbox.untyped_storage().data_ptr()
        )

    def _outgoing(self, payload: Tensor) -> Tensor:
        if self.kind == "nccl":
            return payload.to(self.device)
        if payload.device.type == "cpu":
            return payload.contiguous()
        host = self._host_buffer(payload.numel())
        host.copy_(payload)  # one device-to-host copy into pinned memory
        return host

    def _host_buffer(self, num_bytes: int) -> Tensor:
        pinned = self.device.type == "cuda" and self.kind == "gloo"
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)

    def _message_buffer(self) -> tuple[Tensor, memoryview]:
        buffer = self._host_buffer(HEADER_BYTES + _INLINE_BYTES)
        return buffer, memoryview(buffer.numpy())  # type: ignore[arg-type]

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
