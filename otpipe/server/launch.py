"""From options to a serving rank: check, join, load, describe, listen."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

import msgpack
import torch
from torch import Tensor

from otpipe.errors import RankDied, UsageError
from otpipe.model.bundle import ModelBundle, PublicMap, read_public_files
from otpipe.model.checkpoint import Checkpoint
from otpipe.pipeline.graphs import RowLine
from otpipe.pipeline.jobs import EMPTY, JobHeader, Op
from otpipe.pipeline.liveness import LivenessMonitor
from otpipe.pipeline.placement import GATEWAY_RANK, Placement
from otpipe.pipeline.stage import Stage
from otpipe.pipeline.transport import Transport, TransportKind, choose_transport
from otpipe.protocol.messages import max_linear_rows
from otpipe.protocol.wire import FrameConnection
from otpipe.server.gateway import Gateway, Listener, ListenOptions
from otpipe.server.lanes import Lane, RankCall
from otpipe.server.private_launch import PrivatePlan, serve_private
from otpipe.server.row_loop import compile_loop
from otpipe.server.row_ports import RowRoutes, open_row_port
from otpipe.server.row_server import RowServer
from otpipe.server.service import Audit, Service
from otpipe.server.shutdown import EXIT_RANK_DIED, Shutdown

log = logging.getLogger("otpipe.serve")

PROGRESS_PERIOD_S = 2.0
NAME_THE_DEAD_S = 1.0
"""A broken connection between ranks waits so long for liveness to say which rank it was."""


@dataclass(frozen=True)
class RankOptions:
    """What one rank is started with."""

    model_dir: Path
    rank: int
    local_rank: int
    world_size: int
    device: str
    transport: str
    threads: int | None
    audit: bool
    listen: ListenOptions
    weights: Literal["private", "public"] = "private"


@dataclass(frozen=True)
class RankPlan:
    """Options that have been checked against the machine and the checkpoint.

    Every rank comes to the same verdict here, before anything large is loaded.
    """

    options: RankOptions
    device: torch.device
    transport: TransportKind
    checkpoint: Checkpoint
    placement: Placement
    listener: Listener | None  # the gateway's

    @classmethod
    def check(cls, options: RankOptions) -> RankPlan:
        """Check everything that can be checked without the other ranks.

        Raises:
            OtpipeError: the rank cannot serve; the message says why.
        """
        device = choose_device(options.device, options.local_rank)
        transport = choose_transport(device, options.transport)
        _check_device_share(transport)
        checkpoint = Checkpoint.open(options.model_dir)
        return cls(
            options,
            device,
            transport,
            checkpoint,
            Placement.for_model(checkpoint.spec, options.world_size),
            Listener(options.listen) if options.rank == GATEWAY_RANK else None,
        )


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The one device of this process, made current.

    Raises:
        UsageError: CUDA was asked for and is missing.
    """
    available = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise UsageError("--device cuda: torch sees no CUDA device; use --device cpu or auto")
    # Ranks beyond the number of devices share them, over gloo.
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _check_device_share(transport: TransportKind) -> None:
    if transport != "nccl":
        return
    ranks, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > count:
        raise UsageError(
            f"{ranks} ranks were started for {count} CUDA devices, and NCCL needs one for each; "
            f"use --nproc_per_node={count}, or --transport gloo to share them"
        )


def serve_rank(plan: RankPlan, shutdown: Shutdown) -> None:
    """Join the other ranks, load this one's maps and serve, in background threads.

    Liveness is up before the long loading begins: a rank that is killed there, for want of memory
    as a rule, is named like any other.

    Raises:
        OtpipeError: this rank cannot serve; the message says why.
    """
    options, spec = plan.options, plan.checkpoint.spec
    rank, device = options.rank, plan.device
    if options.threads or device.type == "cpu":
        torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    transport = _join(plan)
    liveness = LivenessMonitor(
        on_death=lambda _rank, sentence: shutdown.ask(EXIT_RANK_DIED, sentence, first_speaker=1),
        on_goodbye=partial(_on_goodbye, shutdown),
    )
    shutdown.at_end(liveness.close)
    liveness.start(rank, options.world_size, transport.store, os.getpid())
    try:
        if options.weights == "private":
            serve_private(_private_plan(plan, transport, shutdown))
            return
        maps = plan.checkpoint.load_maps(
            plan.placement.maps_of(rank), device, _LoadingProgress(rank)
        )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UsageError(
            f"rank {rank} ran out of memory on {device} while loading: {error}; "
            "start more ranks (torchrun --nproc_per_node), or free memory there"
        ) from error
    stage = Stage(maps, spec.maps, device)
    _say(
        rank,
        f"holds {len(maps)} of {len(spec.maps)} maps, "
        f"{stage.weight_bytes / 1e6:.1f} MB of int8 weights on {device}",
    )
    stage.warm_up()
    handle = _survivable(stage.handle, rank, device, shutdown)
    new_row_server = None
    if stage.row_lines:
        new_row_server = _row_servers(plan, stage.row_lines, transport, shutdown)
    if plan.listener is None:
        worker = partial(_work, transport, handle, shutdown)
        threading.Thread(target=worker, name="worker", daemon=True).start()
        return
    max_rows = [max_linear_rows(m.in_features, m.out_features, m.ring_bytes) for m in spec.maps]
    lanes = [
        Lane(peer, handle, max_rows, side_by_side=device.type == "cuda")
        if peer == rank
        else Lane(peer, _remote(transport, peer, device, shutdown), max_rows)
        for peer in range(options.world_size)
    ]
    _open_gateway(plan, plan.listener, lanes, new_row_server, shutdown)


def _join(plan: RankPlan) -> Transport:
    options = plan.options
    try:
        return Transport(options.rank, options.world_size, plan.device, plan.transport)
    except RuntimeError as error:
        first_line = str(error).strip().partition("\n")[0]
        raise RankDied(
            f"rank {options.rank} could not join the others over {plan.transport}: {first_line}; "
            "see that all ranks run and reach each other, or try --transport gloo"
        ) from error


def _private_plan(plan: RankPlan, transport: Transport, shutdown: Shutdown) -> PrivatePlan:
    rank = plan.options.rank
    audit = Audit() if plan.options.audit else None
    if audit is not None:
        shutdown.at_end(lambda: _say(rank, audit.line()))

    def on_device_lost(error: Exception) -> None:
        _device_died(rank, plan.device, str(error).partition("\n")[0], shutdown)

    return PrivatePlan(
        plan.checkpoint,
        plan.placement,
        plan.device,
        transport,
        plan.options.listen,
        plan.listener,
        audit,
        _LoadingProgress(rank),
        partial(_ask_later, shutdown),
        on_device_lost,
        shutdown.at_end,
        partial(_say, rank),
    )


def _open_gateway(
    plan: RankPlan,
    listener: Listener,
    lanes: list[Lane],
    new_row_server: Callable[[FrameConnection], RowServer] | None,
    shutdown: Shutdown,
) -> None:
    audit = Audit() if plan.options.audit else None
    service = Service(
        _assemble_bundle(plan.checkpoint, lanes),
        plan.placement,
        lanes,
        audit,
        pinned=plan.device.type == "cuda",
        new_row_server=new_row_server,
    )
    gateway = Gateway(service, plan.options.listen, listener)
    if audit is not None:
        shutdown.at_end(lambda: _say(GATEWAY_RANK, audit.line()))
    shutdown.at_end(gateway.close)
    gateway.start()
    print(f"otpipe: ready on {gateway.address}", flush=True)


def _row_servers(
    plan: RankPlan, row_lines: Sequence[RowLine], transport: Transport, shutdown: Shutdown
) -> Callable[[FrameConnection], RowServer]:
    """How connections get what serves their few rows; lines are taken in turn.

    On the gateway these are clients' connections, and rows of other ranks' maps go on to them. On
    the other ranks they are the gateway's, and are served from here on.
    """
    compile_loop()
    rank, listen, placement = plan.options.rank, plan.options.listen, plan.placement
    turn = itertools.cycle(row_lines)

    def failed(code: int) -> NoReturn:
        raise _device_died(rank, plan.device, f"driver error {code}", shutdown)

    def lost(map_index: int) -> NoReturn:
        owner = placement.owner_of_map[map_index]
        error = RankDied(f"rank {owner} gave no answer to masked rows")
        _ask_later(shutdown, error)
        raise error

    def new(connection: FrameConnection) -> RowServer:
        _make_current(plan.device)
        return RowServer(
            connection,
            plan.checkpoint.spec.maps,
            next(turn),
            failed,
            listen.stall_timeout_s,
            {} if routes is None else routes.connect(),
            lost,
        )

    routes = None
    if plan.listener is None:
        port = open_row_port(rank, transport.store, new, listen.stall_timeout_s)
        shutdown.at_end(port.close)
    else:
        routes = RowRoutes(placement, transport.store, listen.stall_timeout_s)
    return new


def _assemble_bundle(checkpoint: Checkpoint, lanes: list[Lane]) -> ModelBundle:
    """Collect every rank's public facts; the bundle's fingerprint covers all weights."""
    public: dict[int, PublicMap] = {}
    for lane in lanes:
        _, encoded = lane.call(JobHeader(Op.DESCRIBE), EMPTY)
        described = msgpack.unpackb(bytes(encoded.cpu().numpy()), strict_map_key=False)
        for index, message in described.items():
            public[index] = PublicMap.from_message(message, checkpoint.spec.maps[index])
    return ModelBundle(
        spec=checkpoint.spec,
        norms=checkpoint.load_norms(),
        maps=tuple(public[linear_map.index] for linear_map in checkpoint.spec.maps),
        files=read_public_files(checkpoint.directory),
    )


# -- a rank's work, and its end ------------------------------------------------------------------


def _work(transport: Transport, handle: RankCall, shutdown: Shutdown) -> None:
    try:
        transport.serve(GATEWAY_RANK, handle)
    except RankDied as error:
        _ask_later(shutdown, error)
    except Exception as error:
        log.exception("rank %d failed on an internal error", transport.rank)
        shutdown.ask(EXIT_RANK_DIED, f"rank {transport.rank} died: {error!r}")


def _survivable(handle: RankCall, rank: int, device: torch.device, shutdown: Shutdown) -> RankCall:
    """``handle`` for any thread: a failed job costs its client, a failed device the whole rank."""

    def run(job: JobHeader, payload: Tensor) -> tuple[JobHeader, Tensor]:
        _make_current(device)
        try:
            return handle(job, payload)
        except torch.AcceleratorError as error:
            first_line = str(error).partition("\n")[0]
            raise _device_died(rank, device, first_line, shutdown) from error
        except Exception as error:
            log.exception("rank %d could not do job %s", rank, job)
            text = f"rank {rank} failed on {error!r}; the server's log says more"
            return JobHeader(Op.FAILED), torch.frombuffer(
                bytearray(text.encode()), dtype=EMPTY.dtype
            )

    return run


def _device_died(rank: int, device: torch.device, why: str, shutdown: Shutdown) -> RankDied:
    """Ends the server; the error is for whoever waits for an answer."""
    sentence = f"rank {rank} died: {device} failed ({why}); start the server again"
    shutdown.ask(EXIT_RANK_DIED, sentence)
    return RankDied(sentence)


_current = threading.local()


def _make_current(device: torch.device) -> None:
    """Name the process's one device to CUDA, once a thread: what is current belongs to threads."""
    if device.type == "cuda" and not hasattr(_current, "device"):
        torch.cuda.set_device(device)
        _current.device = device


def _remote(transport: Transport, peer: int, device: torch.device, shutdown: Shutdown) -> RankCall:
    """Jobs for another rank; if it is gone, so is the server."""

    def run(job: JobHeader, payload: Tensor) -> tuple[JobHeader, Tensor]:
        _make_current(device)
        try:
            return transport.call(peer, job, payload)
        except RankDied as error:
            _ask_later(shutdown, error)
            raise

    return run


def _ask_later(shutdown: Shutdown, error: RankDied) -> None:
    """End, after liveness has had the time to say better who died."""
    timer = threading.Timer(
        NAME_THE_DEAD_S, shutdown.ask, (EXIT_RANK_DIED, str(error)), {"first_speaker": 1}
    )
    timer.daemon = True
    timer.start()


def _on_goodbye(shutdown: Shutdown, rank: int, sentence: str) -> None:
    if rank == GATEWAY_RANK:
        shutdown.ask(0, "")  # it has said why itself
        return
    # Stopped together with this rank, as a rule, whose own signal then speaks first.
    time.sleep(NAME_THE_DEAD_S)
    shutdown.ask(EXIT_RANK_DIED, sentence)


class _LoadingProgress:
    """Prints how far a rank's loading is, at most every two seconds."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._loaded_bytes = 0
        self._next_s = time.monotonic() + PROGRESS_PERIOD_S

    def __call__(self, num_bytes: int) -> None:
        self._loaded_bytes += num_bytes
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + PROGRESS_PERIOD_S
            _say(self._rank, f"read {self._loaded_bytes / 1e9:.2f} GB of the checkpoint")


def _say(rank: int, sentence: str) -> None:
    print(f"otpipe: rank {rank} {sentence}", file=sys.stderr, flush=True)
