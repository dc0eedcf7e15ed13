"""Frames on the client's connection: the one place where client bytes are parsed.

A frame is a fixed prefix, a msgpack header and raw little-endian tensor bytes::

    offset  size  field
    0       4     magic  b"OTPW"
    4       2     wire version, little endian
    6       2     message type, little endian
    8       4     header length in bytes, little endian
    12      4     payload length in bytes, little endian
    16      ..    header (msgpack map), then payload

Nothing is ever unpickled. The receiver learns type and lengths from the prefix, parses the small
header, lets the state of the conversation say which payload length it expects, and only then takes
memory for the payload.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgpack
import numpy as np

from otpipe.errors import ConnectionLost, ProtocolError, VersionMismatch

MAGIC = b"OTPW"
WIRE_VERSION = 1
PREFIX = struct.Struct("<4sHHII")
MAX_HEADER_BYTES = 4096
MAX_PAYLOAD_BYTES = 256 << 20
"""Hard limit of any payload. The state of a conversation normally allows far less."""

MAX_HEADER_FIELDS = 16
"""Fields of one header; their values are numbers, strings and byte strings."""

READ_BUFFER_BYTES = 1 << 16
SEND_PIECE_BYTES = 1 << 20
STALL_TIMEOUT_S = 10.0
"""Silence inside a frame after which the peer is given up, unless told otherwise."""

MIN_BYTES_PER_S = 100_000
"""A peer that sends the rest of a begun frame more slowly than this is treated as stalled."""

# The end of a connection also shows behind bytes that nobody has read, where the system tells;
# POLLERR and POLLHUP are always told.
_LEFT = getattr(select, "POLLRDHUP", 0)

Header = dict[str, object]
Buffer = bytes | bytearray | memoryview | np.ndarray


class StalledPeer(ConnectionLost):
    """The peer began a frame and did not finish it in time."""


class IdlePeer(ConnectionLost):
    """The peer sent no frame within the time the caller was ready to wait."""


@dataclass(slots=True)
class Traffic:
    """Bytes and frames that crossed one connection, counted where they cross it."""

    bytes_sent: int = 0
    bytes_received: int = 0
    frames_sent: int = 0
    frames_received: int = 0


def frame_head(message_type: int, header: Header, payload_bytes: int) -> bytes:
    """Prefix and header of one frame."""
    head = msgpack.packb(header)
    return PREFIX.pack(MAGIC, WIRE_VERSION, message_type, len(head), payload_bytes) + head


class FrameConnection:
    """Blocking frames over one TCP or TLS socket.

    One thread may send while another receives; neither direction may be shared by two threads.
    Any error leaves the connection unusable: close it.
    """

    _descriptor = -1  # of this object alone, see descriptor()

    def __init__(self, sock: socket.socket, *, stall_timeout_s: float = STALL_TIMEOUT_S) -> None:
        with contextlib.suppress(OSError):  # not a TCP socket (a socketpair in a test)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._stall_timeout_s = stall_timeout_s
        self._buffer = bytearray(READ_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._begin = 0
        self._end = 0
        self.traffic = Traffic()
        sock.settimeout(stall_timeout_s)

    # -- for compiled code -----------------------------------------------------------------------

    @property
    def descriptor(self) -> int:
        """A descriptor of the socket, non-blocking, for code that reads and writes frames itself.

        It stays this connection's own until nobody holds the connection any more, also when it has
        been closed meanwhile: a number that the system gave to another socket would be a disaster.
        -1 where there are no plain bytes to be had: under TLS, and after the end.
        """
        if self._descriptor < 0 and not isinstance(self._sock, ssl.SSLSocket):
            with contextlib.suppress(OSError):
                number = self._sock.fileno()
                copy = os.dup(number)
                if self._sock.fileno() == number:
                    self._descriptor = copy
                else:  # closed by another thread, and the number may be another socket's by now
                    os.close(copy)
        return self._descriptor

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    @property
    def has_unread(self) -> bool:
        """Whether bytes have arrived that no frame has been made of yet."""
        return self._begin != self._end

    def unread(self, octets: np.ndarray) -> None:
        """Put back uint8 ``octets``, the beginning of a frame; the next receive begins there."""
        assert not self.has_unread, "bytes would change their order"
        self._view[: octets.size] = memoryview(octets)  # type: ignore[arg-type]
        self._begin, self._end = 0, octets.size

    # -- sending ---------------------------------------------------------------------------------

    def send(self, message_type: int, header: Header, payload: Buffer = b"") -> None:
        """Send one frame with one system call where the kernel takes it whole.

        Raises:
            ConnectionLost: the peer is gone, or takes no bytes for ``stall_timeout_s``.
        """
        body = payload if isinstance(payload, bytes) else memoryview(payload).cast("B")  # type: ignore[arg-type]
        self.send_frame(frame_head(message_type, header, len(body)), body)

    def send_frame(self, head: bytes | memoryview, body: bytes | memoryview = b"") -> None:
        """Send one frame whose head is laid out already, as :func:`frame_head` does it.

        ``head`` may carry the payload as well. Raises as :meth:`send` does.
        """
        try:
            self._send_all(head, body)
        except TimeoutError as error:
            raise StalledPeer(
                f"the peer took no bytes for {self._stall_timeout_s:.0f} s; connection given up"
            ) from error
        except OSError as error:
            raise ConnectionLost(f"the connection broke while sending: {error}") from error
        self.traffic.bytes_sent += len(head) + len(body)
        self.traffic.frames_sent += 1

    def _send_all(self, head: bytes | memoryview, body: bytes | memoryview) -> None:
        if body and isinstance(self._sock, ssl.SSLSocket) and len(body) <= READ_BUFFER_BYTES:
            head, body = b"".join((head, body)), b""  # TLS sockets have no scatter-gather
        sent = self._send_some(head, body)
        if sent < len(head):
            self._send_pieces(memoryview(head)[sent:])
            sent = len(head)
        self._send_pieces(memoryview(body)[sent - len(head) :])

    def _send_pieces(self, data: memoryview) -> None:
        # The timeout of sendall covers the whole call, so it gets a bounded piece at a time.
        for start in range(0, len(data), SEND_PIECE_BYTES):
            self._sock.sendall(data[start : start + SEND_PIECE_BYTES])

    def _send_some(self, head: bytes | memoryview, body: bytes | memoryview) -> int:
        """Send what the kernel takes in one call."""
        if isinstance(self._sock, ssl.SSLSocket):
            return 0
        return self._sock.sendmsg((head, body)) if body else self._sock.send(head)

    # -- receiving -------------------------------------------------------------------------------

    def receive_head(self, idle_timeout_s: float | None = None) -> tuple[int, Header, int]:
        """Wait for a frame and return ``(message_type, header, payload_bytes)``.

        The payload has not been read yet: call :meth:`receive_payload` with the length that the
        conversation allows.

        Raises:
            IdlePeer: no frame began within ``idle_timeout_s`` (None: the stall timeout).
            StalledPeer: a frame began and did not continue.
            ConnectionLost: the peer closed or reset the connection.
            VersionMismatch, ProtocolError: the bytes are no frame of this version.
        """
        if self._begin == self._end:
            self._begin = self._end = 0
            self._end = self._wait(self._view, idle_timeout_s)
        deadline = time.monotonic() + self._stall_timeout_s
        prefix = self._take(PREFIX.size, deadline)
        magic, version, message_type, header_bytes, payload_bytes = PREFIX.unpack(prefix)
        if magic != MAGIC:
            raise ProtocolError(
                f"the first bytes are {bytes(prefix[:4])!r}, not {MAGIC!r}: the peer does not "
                "speak the otpipe protocol; check host and port, and that both or neither use TLS"
            )
        if version != WIRE_VERSION:
            raise VersionMismatch(
                f"the peer speaks wire version {version}, this side version {WIRE_VERSION}; "
                "install the same otpipe release on both sides"
            )
        if header_bytes > MAX_HEADER_BYTES:
            raise ProtocolError(
                f"a header of {header_bytes} bytes was announced; the limit is {MAX_HEADER_BYTES}"
            )
        if payload_bytes > MAX_PAYLOAD_BYTES:
            raise ProtocolError(
                f"a payload of {payload_bytes} bytes was announced; the limit is "
                f"{MAX_PAYLOAD_BYTES}"
            )
        raw = bytes(self._take(header_bytes, deadline))
        try:
            header = msgpack.unpackb(
                raw,
                strict_map_key=True,
                max_map_len=MAX_HEADER_FIELDS,
                max_array_len=0,
                max_ext_len=0,
            )
        except Exception as error:  # msgpack raises many unrelated types on bad input
            raise ProtocolError(f"a frame header is not valid msgpack: {error}") from error
        if not isinstance(header, dict) or not all(isinstance(key, str) for key in header):
            raise ProtocolError("a frame header is not a map with string keys")
        self.traffic.bytes_received += PREFIX.size + header_bytes
        self.traffic.frames_received += 1
        return message_type, header, payload_bytes

    def receive_due(
        self, head: bytes, frame: memoryview, idle_timeout_s: float | None = None
    ) -> bool:
        """Receive the one frame that is due, whose head is known, into memory that is ready for it.

        Args:
            head: the head of the frame, as :func:`frame_head` makes it.
            frame: filled with the head and the payload.

        Returns:
            False if the peer sent something else, which then waits for :meth:`receive_head`.

        Raises:
            IdlePeer, StalledPeer, ConnectionLost: as :meth:`receive_head`.
        """
        if self._begin != self._end:
            return False
        filled = self._wait(frame[:READ_BUFFER_BYTES], idle_timeout_s)
        deadline = time.monotonic() + self._stall_timeout_s + len(frame) / MIN_BYTES_PER_S
        while filled < len(head):
            filled += self._recv_into(frame[filled:READ_BUFFER_BYTES], deadline)
        if frame[: len(head)].tobytes() != head:
            self._view[:filled] = frame[:filled]
            self._begin, self._end = 0, filled
            return False
        while filled < len(frame):
            filled += self._recv_into(frame[filled:], deadline)
        self.traffic.bytes_received += len(frame)
        self.traffic.frames_received += 1
        return True

    def receive_payload(
        self, announced: int, expected: int, new_buffer: Callable[[int], np.ndarray] | None = None
    ) -> np.ndarray:
        """Read the payload of the current frame into a fresh uint8 array.

        Args:
            announced: length from the frame's prefix.
            expected: the only length that the conversation allows now.
            new_buffer: returns the uint8 array to fill, given its length in bytes.

        Raises:
            ProtocolError: the lengths differ; no memory has been taken.
        """
        if announced != expected:
            raise ProtocolError(
                f"a payload of {announced} bytes was announced where {expected} bytes are due"
            )
        out = np.empty(expected, dtype=np.uint8) if new_buffer is None else new_buffer(expected)
        view = memoryview(out).cast("B")  # type: ignore[arg-type]
        filled = min(self._end - self._begin, expected)
        view[:filled] = self._view[self._begin : self._begin + filled]
        self._begin += filled
        deadline = time.monotonic() + self._stall_timeout_s + expected / MIN_BYTES_PER_S
        while filled < expected:
            filled += self._recv_into(view[filled:], deadline)
        self.traffic.bytes_received += expected
        return out

    def _take(self, count: int, deadline: float) -> memoryview:
        """Return the next ``count`` buffered bytes; valid until the next receive call."""
        if self._begin + count > READ_BUFFER_BYTES:
            kept = self._end - self._begin
            self._buffer[:kept] = self._buffer[self._begin : self._end]
            self._begin, self._end = 0, kept
        while self._end - self._begin < count:
            self._end += self._recv_into(self._view[self._end :], deadline)
        taken = self._view[self._begin : self._begin + count]
        self._begin += count
        return taken

    def _wait(self, view: memoryview, idle_timeout_s: float | None) -> int:
        """Receive the first bytes of a frame; returns how many."""
        wait_s = self._stall_timeout_s if idle_timeout_s is None else idle_timeout_s
        try:
            self._sock.settimeout(wait_s)
        except OSError as error:
            raise ConnectionLost(f"the connection was closed: {error}") from error
        try:
            return self._recv_into(view, None)
        except StalledPeer as error:
            raise IdlePeer(f"the peer sent nothing for {wait_s:.0f} s") from error
        finally:
            with contextlib.suppress(OSError):
                self._sock.settimeout(self._stall_timeout_s)

    def _recv_into(self, view: memoryview, deadline: float | None) -> int:
        if deadline is not None and time.monotonic() > deadline:
            raise StalledPeer("the peer began a frame and did not finish it in time")
        try:
            count = self._sock.recv_into(view)
        except TimeoutError as error:
            raise StalledPeer("the peer began a frame and did not finish it in time") from error
        except OSError as error:
            raise ConnectionLost(f"the connection broke while receiving: {error}") from error
        if count == 0:
            raise ConnectionLost("the peer closed the connection")
        return count

    def peer_has_left(self) -> bool:
        """Whether the peer has closed or lost the connection; reads nothing, does not wait."""
        if self._sock.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(self._sock, _LEFT)
        return bool(poll.poll(0))

    def release(self) -> socket.socket:
        """The socket, for whoever goes on with its bytes; this object is not to be used again.

        Raises:
            ProtocolError: the peer has sent more than the frames that were received.
        """
        if self._begin != self._end:
            raise ProtocolError(
                f"the peer sent {self._end - self._begin} bytes before it was its turn"
            )
        return self._sock

    def close(self) -> None:
        """Close the socket; wakes a thread that is blocked in it. Safe to call twice."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._sock.close()
