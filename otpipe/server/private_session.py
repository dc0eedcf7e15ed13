"""One client's connection to one rank with private weights: every arriving frame is checked.

States: *attached* -MASKED_BEGIN-> *queued* -OLE_READY-> *uploading* -last block-> answers, and
back; or -JOIN-> OT setup -> *joined*, in which preparations of attention products and passes follow
each other. Whatever goes wrong ends the connection, and with it the shares and masks that the rank
holds for it.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from otpipe.errors import ConnectionLost, OtpipeError, ProtocolError, RankDied
from otpipe.model.private_maps import Masks, ServerMaps
from otpipe.model.private_program import Runner, Stage
from otpipe.ot import OtSender, Stock
from otpipe.protocol.messages import Error, MessageType, Ping, Pong, send_message
from otpipe.protocol.private_messages import (
    LOGITS_FOR,
    MAX_PASS_ROWS,
    SESSION_ID_BYTES,
    Attached,
    Join,
    Joined,
    MaskedBegin,
    Pass,
    PassDone,
    PassReady,
    Prepare,
    PrepareReady,
    parse_spans,
    spans_bytes,
)
from otpipe.protocol.wire import MIN_BYTES_PER_S, FrameConnection, Header, IdlePeer
from otpipe.protocol.wire_channel import SilentPeer, WireChannel, peer_error
from otpipe.secure.party import Party
from otpipe.server.private_exchange import serve_exchange
from otpipe.server.private_rank import PrivateRank
from otpipe.server.session_text import SessionText

log = logging.getLogger("otpipe.server")

SILENCE_S = 120.0
"""How long a client may compute between two messages. One that is gone shows at once, or within
seconds, since its connection ends."""

PREPARE_SLACK_S = 60.0
"""Waiting that a preparation of any size may cost the server, beyond what its bytes take."""

PASS_S = 600.0
"""How long a pass may take on other ranks while this one waits."""


@dataclass
class _Joined:
    """What lives as long as a session does."""

    channel: WireChannel
    party: Party
    stock: Stock
    text: SessionText


class RankSession:
    """Serve one connection until it ends; whoever made the connection closes it.

    Args:
        connection: frames of this client, greeted already.
        rank: what this rank holds.
        idle_timeout_s: how long a client may stay silent between requests.
    """

    def __init__(
        self, connection: FrameConnection, rank: PrivateRank, idle_timeout_s: float
    ) -> None:
        self._connection = connection
        self._rank = rank
        self._idle_timeout_s = idle_timeout_s
        self._session = b""
        self._state: _Joined | None = None
        self._passes = 0

    def run(self) -> None:
        """Answer requests until the client leaves or breaks the protocol."""
        try:
            self._rank.make_current()
            send_message(self._connection, Attached(self._rank.rank))
            while True:
                message_type, header, announced = self._connection.receive_head(
                    self._idle_timeout_s
                )
                self._dispatch(message_type, header, announced)
        except IdlePeer as error:
            # No word to the client: it would be taken for the answer to its next request.
            log.info("client dropped: %s", error)
        except OtpipeError as error:
            if isinstance(error, ConnectionLost | RankDied) and not isinstance(error, SilentPeer):
                log.info("client left: %s", error)
            else:
                log.warning("client refused: %s", error)
                self._refuse(str(error))
        except torch.AcceleratorError as error:
            self._rank.on_device_lost(error)
        except (torch.OutOfMemoryError, MemoryError):
            log.warning("rank %d ran out of memory for a client", self._rank.rank)
            self._refuse(f"rank {self._rank.rank} ran out of memory; ask for fewer rows or slots")
        except Exception:
            # One client's misfortune must not end the service for the others.
            log.exception("a client's session ended on an internal error")
            self._refuse("the server failed on an internal error; its log says more")
        finally:
            if self._state is not None:
                self._state.text.close()
            self._state = None
            if self._session:
                self._rank.mailbox.close(self._session)

    def _refuse(self, text: str) -> None:
        try:
            send_message(self._connection, Error(text[:1000]))
        except ConnectionLost:
            log.info("the refused client was already gone")

    def _dispatch(self, message_type: int, header: Header, announced: int) -> None:
        match message_type:
            case MessageType.PING:
                Ping.parse(header)
                self._no_payload(announced)
                send_message(self._connection, Pong())
            case MessageType.MASKED_BEGIN if not self._session:
                request = MaskedBegin.parse(header)
                self._no_payload(announced)
                serve_exchange(self._connection, self._rank, request)
            case MessageType.JOIN if not self._session:
                join = Join.parse(header)
                self._no_payload(announced)
                self._join(join)
            case MessageType.PREPARE if self._session:
                preparation = Prepare.parse(header)
                self._no_payload(announced)
                self._prepare(preparation)
            case MessageType.PASS if self._session:
                self._pass(Pass.parse(header), announced)
            case MessageType.ERROR:
                raise peer_error("client", header)
            case _:
                state = "inside a session" if self._session else "before a session"
                raise ProtocolError(
                    f"message type {message_type} arrived {state}; open a new connection"
                )

    def _no_payload(self, announced: int) -> None:
        self._connection.receive_payload(announced, 0)

    # -- a session -------------------------------------------------------------------------------

    def _join(self, join: Join) -> None:
        due = 0 if self._rank.is_gateway else SESSION_ID_BYTES
        if len(join.session) != due:
            raise ProtocolError(
                f"JOIN names a session of {len(join.session)} bytes; rank {self._rank.rank} "
                f"expects {due}"
            )
        session = join.session or os.urandom(SESSION_ID_BYTES)
        if not self._rank.mailbox.open(session):
            raise ProtocolError("this session has joined this rank already; begin another")
        self._session = session
        send_message(self._connection, Joined(session))
        channel = WireChannel(self._connection, "client", SILENCE_S, self._rank.audit)
        sender = OtSender(channel, self._rank.device)
        sender.setup()
        party = Party("server", sender, channel, self._rank.device)
        text = SessionText(self._rank, session, channel)
        self._state = _Joined(channel, party, Stock(sender), text)

    def _prepare(self, request: Prepare) -> None:
        """The next attention products. No other rank is waited for: no turn of a pass is held."""
        if not self._rank.ole_turns.take(self._connection.peer_has_left):
            raise ConnectionLost("it did not wait for its turn to prepare")
        try:
            upload = self._joined.text.begin_preparation(request)
            send_message(self._connection, PrepareReady(request.first))
            with self._joined.channel.at_a_pace(PREPARE_SLACK_S + upload / MIN_BYTES_PER_S):
                self._joined.text.products.prepare(request.count)
        finally:
            self._rank.ole_turns.give_back()

    def _pass(self, request: Pass, announced: int) -> None:
        payload = self._connection.receive_payload(announced, spans_bytes(request))
        spans = parse_spans(request, payload.tobytes())
        self._check(request)
        rank = self._rank
        if not rank.is_gateway:
            masks = rank.ledger.draw(spans)
            self._run(request, masks)
            return
        if not rank.pass_turns.take(self._connection.peer_has_left):
            raise ConnectionLost("it did not wait for its turn")
        try:
            masks = rank.ledger.draw(spans)
            send_message(self._connection, PassReady(request.number))
            self._run(request, masks)
            self._wait_for_end(request)
        finally:
            rank.pass_turns.give_back()

    def _check(self, request: Pass) -> None:
        """Refuse a pass that does not follow the one before."""
        if request.number != self._passes:
            raise ProtocolError(f"pass {request.number} arrived where pass {self._passes} was due")
        if not 1 <= request.rows <= MAX_PASS_ROWS:
            raise ProtocolError(
                f"a pass over {request.rows} rows was asked for; 1 to {MAX_PASS_ROWS} are allowed"
            )
        if request.logits_for >= len(LOGITS_FOR):
            raise ProtocolError(f"a pass asked for logits of kind {request.logits_for}")
        self._joined.text.begin_pass(request)
        self._passes += 1

    @property
    def _joined(self) -> _Joined:
        assert self._state is not None, "a session begins with JOIN"
        return self._state

    def _run(self, request: Pass, masks: Masks) -> None:
        rank, joined = self._rank, self._joined
        maps = ServerMaps(joined.party, rank.description, rank.weights, masks)

        def receive(stage: Stage) -> Tensor:
            key = rank.key(self._session, request.number, stage)
            share = rank.mailbox.take(key, self._connection.peer_has_left, PASS_S)
            if share is None:
                raise ConnectionLost("it left, or took too long, in the middle of a pass")
            if share.shape != (request.rows, rank.description.spec.hidden_size):
                raise ProtocolError(
                    f"a pass has {request.rows} rows on this rank and {len(share)} on another"
                )
            return share.to(rank.device)

        def send(stage: Stage, share_TH: Tensor) -> None:
            rank.send_share(rank.key(self._session, request.number, stage), share_TH)

        joined.stock.fill(request.rows)
        rank.program.serve(
            Runner(joined.party, maps, joined.text.products),
            joined.text.cache,
            rank.owns,
            request.rows,
            LOGITS_FOR[request.logits_for],  # type: ignore[arg-type]
            receive,
            send,
        )
        joined.stock.note(request.rows)
        joined.text.end_pass()

    def _wait_for_end(self, request: Pass) -> None:
        """Hold the turn until the client has come to the end of its pass on all ranks."""
        message_type, header, announced = self._connection.receive_head(PASS_S)
        self._no_payload(announced)
        if message_type == MessageType.ERROR:
            raise peer_error("client", header)
        if message_type != MessageType.PASS_DONE:
            raise ProtocolError(f"message type {message_type} arrived before PASS_DONE")
        done = PassDone.parse(header)
        if done.number != request.number:
            raise ProtocolError(f"PASS_DONE {done.number} ends no pass; due is {request.number}")
