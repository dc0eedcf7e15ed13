"""One client's connection: a small state machine in which every arriving frame is checked."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from otpipe.crypto.noise import choose_upload_bytes
from otpipe.crypto.params import RlweParams, params_for_ring
from otpipe.errors import ConnectionLost, OtpipeError, ProtocolError, RankDied
from otpipe.model.spec import LinearMap
from otpipe.pipeline.graphs import LINE_ROWS
from otpipe.pipeline.jobs import EMPTY, JobHeader, Op
from otpipe.protocol.messages import (
    A_KEY_BYTES,
    MAX_OLE_BLOCK_BYTES,
    Bundle,
    Error,
    GetBundle,
    Hello,
    Linear,
    MessageType,
    OleAnswer,
    OleBegin,
    OleBlock,
    OleReady,
    Ping,
    Pong,
    Result,
    max_linear_rows,
    message_head,
    send_message,
)
from otpipe.protocol.wire import MIN_BYTES_PER_S, FrameConnection, Header, IdlePeer
from otpipe.server.lanes import Lane
from otpipe.server.row_server import RowServer
from otpipe.server.service import Service

log = logging.getLogger("otpipe.server")

ANSWER_FRAME_BYTES = 2 << 20
"""Of answers of the preparation; a client decrypts one frame while the next arrives."""

SLACK_S = 30.0
"""Waiting that an exchange of any size may cost the server, beyond what its bytes take."""


@dataclass
class _OleState:
    """A preprocessing exchange that has begun and waits for its remaining blocks."""

    lane: Lane
    number: int
    linear_map: LinearMap
    params: RlweParams
    upload_bytes: int
    patience_s: float  # how much longer the server will wait for blocks, all of them together
    next_coordinate: int = 0
    block: Tensor = EMPTY  # memory for one block after another

    def buffer(self, num_bytes: int) -> np.ndarray:
        """uint8 (num_bytes,) that the next block may overwrite."""
        if self.block.numel() < num_bytes:
            # From pinned memory a copy to the GPU takes a third of the time.
            pinned = torch.cuda.is_initialized()
            self.block = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        return self.block[:num_bytes].numpy()


class ClientSession:
    """Serve one connection until it ends; whoever made the connection closes it.

    Args:
        connection: frames of this client.
        service: what the server offers to all clients.
        idle_timeout_s: how long a client may stay silent between requests.
    """

    def __init__(
        self, connection: FrameConnection, service: Service, idle_timeout_s: float
    ) -> None:
        self._connection = connection
        self._service = service
        self._idle_timeout_s = idle_timeout_s
        self._ole: _OleState | None = None
        self._greeted = False
        self._few_rows = False  # what came last
        self._row_server: RowServer | None = None
        self._waiting_since_s = 0.0

    def run(self) -> None:
        """Answer requests until the client leaves or breaks the protocol."""
        try:
            while True:
                if self._few_rows:
                    self._serve_few_rows()
                self._waiting_since_s = time.monotonic()
                message_type, header, announced = self._connection.receive_head(self._patience_s())
                self._dispatch(message_type, header, announced)
        except IdlePeer as error:
            # No word to the client: an ERROR would wait in its buffer and be taken for the answer
            # to its next request. A closed connection makes it reconnect.
            log.info("client dropped: %s", error)
        except ConnectionLost as error:
            log.info("client left: %s", error)
        except RankDied as error:
            # No word to the client: it takes a closed connection for a lost server, and goes on
            # with a replica or with this server's next life.
            log.info("client dropped: %s", error)
        except OtpipeError as error:
            log.warning("client refused: %s", error)
            self._refuse(str(error))
        except Exception:
            # One client's misfortune must not end the service for the others.
            log.exception("a client's session ended on an internal error")
            self._refuse("the server failed on an internal error; its log says more")
        finally:
            self._drop_ole()
            if self._row_server is not None:
                self._row_server.close()

    def _serve_few_rows(self) -> None:
        """The next frames without Python, until something else comes."""
        if self._row_server is None:
            self._row_server = self._service.row_server(self._connection)
        if self._row_server is not None and not self._connection.has_unread:
            self._row_server.run(self._idle_timeout_s)

    def _patience_s(self) -> float | None:
        """How long to wait for the next frame; None is the short stall timeout.

        That is enough before the greeting, and for a client that holds a rank's memory: between
        the blocks of an exchange, whose blocks together also have to keep a lowest pace.
        """
        if self._ole is not None and self._ole.patience_s < 0:
            raise ProtocolError(
                f"the blocks of {self._ole.linear_map.name} came more slowly than "
                f"{MIN_BYTES_PER_S} bytes/s; prepare over a faster line"
            )
        return self._idle_timeout_s if self._greeted and self._ole is None else None

    def _refuse(self, text: str) -> None:
        try:
            send_message(self._connection, Error(text[:1000]))
        except ConnectionLost:
            log.info("the refused client was already gone")

    def _dispatch(self, message_type: int, header: Header, announced: int) -> None:
        self._few_rows = False
        if not self._greeted and message_type != MessageType.HELLO:
            raise ProtocolError(
                f"the first message has type {message_type}; a client begins with HELLO"
            )
        if self._ole is not None and message_type != MessageType.OLE_BLOCK:
            raise ProtocolError(
                f"message type {message_type} arrived inside a preprocessing exchange; "
                "only OLE_BLOCK may follow OLE_BEGIN until all coordinates are sent"
            )
        match message_type:
            case MessageType.HELLO:
                Hello.parse(header)
                self._no_payload(announced)
                self._greeted = True
                send_message(self._connection, self._service.welcome)
            case MessageType.GET_BUNDLE:
                GetBundle.parse(header)
                self._no_payload(announced)
                send_message(self._connection, Bundle(), self._service.bundle)
            case MessageType.PING:
                Ping.parse(header)
                self._no_payload(announced)
                send_message(self._connection, Pong())
            case MessageType.LINEAR:
                self._linear(Linear.parse(header), announced)
            case MessageType.OLE_BEGIN:
                self._ole_begin(OleBegin.parse(header), announced)
            case MessageType.OLE_BLOCK:
                self._ole_block(OleBlock.parse(header), announced)
            case _:
                raise ProtocolError(f"message type {message_type} is not a request")

    def _no_payload(self, announced: int) -> None:
        self._connection.receive_payload(announced, 0)

    def _map(self, index: int) -> LinearMap:
        maps = self._service.spec.maps
        if not 0 <= index < len(maps):
            raise ProtocolError(f"map {index} was asked for; this model has 0 to {len(maps) - 1}")
        return maps[index]

    def _linear(self, request: Linear, announced: int) -> None:
        linear_map = self._map(request.map_index)
        most = max_linear_rows(
            linear_map.in_features, linear_map.out_features, linear_map.ring_bytes
        )
        if not 1 <= request.rows <= most:
            raise ProtocolError(
                f"{request.rows} rows were sent through {linear_map.name}; 1 to {most} are allowed"
            )
        row_bytes = linear_map.in_features * linear_map.ring_bytes
        payload = self._connection.receive_payload(
            announced, request.rows * row_bytes, self._service.new_buffer
        )
        self._service.audit(payload)
        lane = self._service.lane_of(linear_map.index)
        result = lane.linear(linear_map.index, request.rows, torch.from_numpy(payload))
        answer = memoryview(result.numpy())  # type: ignore[arg-type]
        head = message_head(Result(linear_map.index, request.rows), len(answer))
        self._connection.send_frame(head, answer)
        self._few_rows = request.rows <= LINE_ROWS[-1]

    def _ole_begin(self, request: OleBegin, announced: int) -> None:
        self._no_payload(announced)
        linear_map = self._map(request.map_index)
        params = params_for_ring(linear_map.ring_bits)
        slots = request.num_slots
        if not 1 <= slots <= params.ring_degree or slots & (slots - 1):
            raise ProtocolError(
                f"a batch of {slots} slots was asked for; a power of two up to "
                f"{params.ring_degree} is allowed"
            )
        if len(request.a_key) != A_KEY_BYTES:
            raise ProtocolError(f"a_key has {len(request.a_key)} bytes; {A_KEY_BYTES} are due")
        due = choose_upload_bytes(
            params,
            self._service.max_row_l2(linear_map.index),
            linear_map.in_features,
            params.ring_degree // slots,
        )
        if request.upload_bytes != due:
            raise ProtocolError(
                f"{request.upload_bytes} bytes a coefficient were announced for "
                f"{linear_map.name}; its noise budget calls for {due}"
            )
        lane = self._service.lane_of(linear_map.index)
        # The client waits for OLE_READY, so this may take its time.
        if not lane.ole_turns.take(self._connection.peer_has_left):
            raise ConnectionLost("it did not wait for its turn to prepare")
        upload_s = linear_map.in_features * params.ring_degree * due / MIN_BYTES_PER_S
        self._ole = _OleState(lane, lane.new_session(), linear_map, params, due, SLACK_S + upload_s)
        a_key = torch.frombuffer(bytearray(request.a_key), dtype=torch.uint8)
        lane.call(
            JobHeader(
                Op.OLE_BEGIN, linear_map.index, rows=slots, session=self._ole.number, extra=due
            ),
            a_key,
        )
        send_message(self._connection, OleReady(linear_map.index))

    def _ole_block(self, block: OleBlock, announced: int) -> None:
        state = self._ole
        if state is None:
            raise ProtocolError("OLE_BLOCK arrived before OLE_BEGIN")
        left = state.linear_map.in_features - state.next_coordinate
        coordinate_bytes = state.params.ring_degree * state.upload_bytes
        most = min(left, MAX_OLE_BLOCK_BYTES // coordinate_bytes)
        if block.first != state.next_coordinate or not 1 <= block.count <= most:
            raise ProtocolError(
                f"coordinates {block.first} to {block.first + block.count} arrived; due are "
                f"{state.next_coordinate} to at most {state.next_coordinate + most}"
            )
        payload = self._connection.receive_payload(
            announced, block.count * coordinate_bytes, state.buffer
        )
        state.patience_s -= time.monotonic() - self._waiting_since_s
        self._service.audit(payload)
        state.lane.call(
            JobHeader(
                Op.OLE_BLOCK,
                state.linear_map.index,
                rows=block.count,
                session=state.number,
                first=block.first,
                extra=state.upload_bytes,
            ),
            torch.from_numpy(payload),
        )
        state.next_coordinate += block.count
        if state.next_coordinate == state.linear_map.in_features:
            self._send_answers(state)

    def _send_answers(self, state: _OleState) -> None:
        while True:
            header, answer = state.lane.call(
                JobHeader(Op.OLE_NEXT, state.linear_map.index, session=state.number)
            )
            if header.first < 0:
                break
            self._send_groups(state, header.first, _as_bytes(answer).reshape(header.rows, -1))
        self._ole = None
        state.lane.ole_turns.give_back()

    def _send_groups(self, state: _OleState, first_group: int, groups: np.ndarray) -> None:
        """Send answer ciphertexts, uint8 (G, bytes), in frames that suit the client's caches."""
        step = max(1, ANSWER_FRAME_BYTES // groups.shape[1])
        for lo in range(0, len(groups), step):
            piece = groups[lo : lo + step]
            send_message(
                self._connection,
                OleAnswer(state.linear_map.index, first_group + lo, len(piece)),
                piece.reshape(-1),
            )

    def _drop_ole(self) -> None:
        """Free what a vanished client left on a rank."""
        if self._ole is None:
            return
        state, self._ole = self._ole, None
        try:
            state.lane.call(JobHeader(Op.OLE_DROP, session=state.number))
        except OtpipeError as error:
            log.warning("preprocessing session could not be dropped: %s", error)
        finally:
            state.lane.ole_turns.give_back()


def _as_bytes(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
