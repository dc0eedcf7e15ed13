"""What an eavesdropper or the server could notice in recorded traffic, as functions.

Every check returns a list of findings, one sentence each; an empty list means that nothing was
found. The same functions judge the real client and the deliberately broken ones, so a test that
finds nothing is known to be able to find something.

Limits are set so that uniform bytes give a finding with a probability near 1e-9 per statistic.

Suffixes: R rows of a map, n features, P bytes of a word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import msgpack
import numpy as np
from numpy.typing import NDArray
from proxies import Frame, Recording

from otpipe.crypto.params import RlweParams
from otpipe.protocol.messages import MessageType
from otpipe.protocol.wire import PREFIX

SIGMAS = 6.0
"""Limit of a normal statistic: exceeded with probability 2e-9."""

MIN_EXPECTED = 5.0
"""Fewer expected values in a cell make a chi-square statistic meaningless."""

WORD_BYTES = 8
BLOCK_BYTES = 16

Bytes = bytes | bytearray


def chi_square_limit(degrees: int) -> float:
    """Upper limit of a chi-square statistic (Wilson and Hilferty, 1931)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + SIGMAS * math.sqrt(spread)) ** 3


def _columns(data: Bytes, period: int) -> NDArray[np.uint8]:
    """uint8 (P, words): byte position within a word first."""
    octets = np.frombuffer(bytes(data), np.uint8)
    if len(octets) % period:
        raise ValueError(f"{len(octets)} bytes are no whole number of {period}-byte words")
    return octets.reshape(-1, period).T


# -- uniformity ----------------------------------------------------------------------------------


def uniform_law(period: int) -> NDArray[np.float64]:
    """Probability (P, 256) of every byte value at every position of a uniform word."""
    return np.full((period, 256), 1 / 256)


def upload_law(params: RlweParams, upload_bytes: int) -> NDArray[np.float64]:
    """Byte law (P, 256) of a coefficient of b that is uniform mod q, as it is packed.

    Two things make it differ from uniform bytes, both of them public functions of a uniform
    value: 53 bits in 7 bytes leave the top 3 bits zero; and rounding d bits away with ties to
    even gives 2^d + 1 residues to every even result and 2^d - 1 to every odd one.
    """
    law = uniform_law(upload_bytes)
    dropped = params.dropped_upload_bits(upload_bytes)
    if dropped:
        law[0, 0::2] *= 1 + 2.0**-dropped
        law[0, 1::2] *= 1 - 2.0**-dropped
    unused = 8 * upload_bytes - (params.log2_q - dropped)
    law[-1, 256 >> unused :] = 0
    law[-1, : 256 >> unused] *= 1 << unused
    return law


def not_uniform(
    data: Bytes, what: str, *, period: int = 1, law: NDArray[np.float64] | None = None
) -> list[str]:
    """Chi-square of all byte positions of a word, and serial correlation between bytes.

    Args:
        data: whole words of ``period`` bytes.
        law: probability (P, 256) of each value at each position; None: uniform.

    Raises:
        ValueError: too few bytes to say anything.
    """
    law = uniform_law(period) if law is None else law
    columns = _columns(data, period)
    words = columns.shape[1]
    findings = []
    for position in range(period):
        expected = law[position] * words
        possible = expected > 0
        if expected[possible].min(initial=np.inf) < MIN_EXPECTED:
            raise ValueError(f"{what}: {words} words are too few for a chi-square test")
        counts = np.bincount(columns[position], minlength=256)
        if counts[~possible].any():
            findings.append(f"{what}: byte {position} of {period} has values it may not have")
        terms = (counts - expected)[possible] ** 2 / expected[possible]
        degrees = int(possible.sum()) - 1
        if terms.sum() > chi_square_limit(degrees):
            findings.append(
                f"{what}: byte {position} of {period} has chi-square {terms.sum():.0f} with "
                f"{degrees} degrees of freedom"
            )
    return findings + _correlated(columns, law, what)


def _correlated(columns: NDArray[np.uint8], law: NDArray[np.float64], what: str) -> list[str]:
    """Correlation of each byte with the ones up to 16 bytes, and up to 4 words, before it."""
    values = np.arange(256)
    mean = (law * values).sum(axis=1, keepdims=True)
    deviation = np.sqrt((law * values**2).sum(axis=1, keepdims=True) - mean**2)
    normal = ((columns - mean) / deviation).T.reshape(-1)
    period = len(columns)
    findings = []
    for lag in sorted({*range(1, 17), *(period * k for k in range(1, 5))}):
        score = float(normal[lag:] @ normal[:-lag]) / math.sqrt(len(normal) - lag)
        if abs(score) > SIGMAS:
            findings.append(f"{what}: bytes {lag} apart correlate, {score:+.1f} sigmas")
    return findings


def distinguishable(a: Bytes, b: Bytes, what: str, *, period: int = 1) -> list[str]:
    """Two-sample chi-square on the byte histograms of every position: are a and b alike?"""
    findings = []
    for position, (x, y) in enumerate(zip(_columns(a, period), _columns(b, period), strict=True)):
        counts = np.stack([np.bincount(x, minlength=256), np.bincount(y, minlength=256)])
        counts = counts[:, counts.sum(axis=0) > 0]
        share = counts.sum(axis=1, keepdims=True) / counts.sum()
        expected = share * counts.sum(axis=0)
        if len(counts[0]) > 1 and expected.mean() < MIN_EXPECTED:
            raise ValueError(f"{what}: {len(x)} and {len(y)} words are too few")
        statistic = ((counts - expected) ** 2 / expected).sum()
        if len(counts[0]) > 1 and statistic > chi_square_limit(len(counts[0]) - 1):
            findings.append(
                f"{what}: byte {position} of {period} tells the two inputs apart, chi-square "
                f"{statistic:.0f} with {len(counts[0]) - 1} degrees of freedom"
            )
    return findings


# -- repetition ----------------------------------------------------------------------------------


def repeated_blocks(payloads: Sequence[bytes], what: str) -> list[str]:
    """Whether any aligned 16-byte block occurs twice, within one payload or in two."""
    whole = b"".join(p[: len(p) // BLOCK_BYTES * BLOCK_BYTES] for p in payloads)
    blocks = np.frombuffer(whole, np.dtype([("low", "<u8"), ("high", "<u8")]))
    distinct = len(np.unique(blocks))
    if distinct == len(blocks):
        return []
    return [f"{what}: {len(blocks) - distinct} of {len(blocks)} 16-byte blocks are repetitions"]


def shared_substrings(a: bytes, b: bytes, what: str) -> list[str]:
    """Whether a and b share a substring: finds all of 15 bytes or more, at any alignment."""
    words = np.frombuffer(a, "<u8", count=len(a) // WORD_BYTES)
    found = 0
    for offset in range(WORD_BYTES):
        count = (len(b) - offset) // WORD_BYTES
        shifted = np.frombuffer(b, "<u8", count=max(0, count), offset=min(offset, len(b)))
        found += int(np.isin(words, shifted).sum())
    return [f"{what}: {found} aligned 8-byte words occur in both"] if found else []


def close_rows(rows_Rn: NDArray[np.unsignedinteger], what: str) -> list[str]:
    """Pairs of masked rows whose difference is small: what two messages under one pad look like.

    Under one pad the difference is that of two activations, which have 25 bits at most in a
    32-bit ring and are 0 or 1 in the 8-bit ring of the one-hot tokens.
    """
    bits = 8 * rows_Rn.dtype.itemsize
    num_rows, width = rows_Rn.shape
    pairs = num_rows * (num_rows - 1) / 2
    # A difference in [-bound, bound) is small: 2 of 256 top bytes, or 4 of 256 values.
    bound = rows_Rn.dtype.type(1 << (bits - 8)) if bits > 8 else rows_Rn.dtype.type(2)
    limit = _binomial_limit(width, 2 * int(bound) / 2**bits, 1e-9 / max(1.0, pairs))
    findings = []
    for i in range(num_rows - 1):
        shifted = rows_Rn[i + 1 :] - rows_Rn[i] + bound  # unsigned: wraps
        small = (shifted < 2 * bound).sum(axis=1)
        findings += [
            f"{what}: rows {i} and {i + 1 + int(j)} are close in {small[j]} of {width} elements"
            for j in np.flatnonzero(small > limit)
        ]
    return findings


def _binomial_limit(count: int, probability: float, tail: float) -> int:
    """Smallest k with Pr(Binomial(count, probability) > k) <= tail."""
    above, k = 0.0, count
    while k > 0:
        log_term = (
            math.lgamma(count + 1)
            - math.lgamma(k + 1)
            - math.lgamma(count - k + 1)
            + k * math.log(probability)
            + (count - k) * math.log1p(-probability)
        )
        above += math.exp(log_term)
        if above > tail:
            return k
        k -= 1
    return k


def difference_of_rows(rows_Rn: NDArray[np.unsignedinteger], what: str) -> list[str]:
    """Whether the differences (mod 2^k) of disjoint pairs of rows are uniform."""
    half = len(rows_Rn) // 2
    difference = rows_Rn[:half] - rows_Rn[half : 2 * half]
    return not_uniform(difference.tobytes(), what, period=rows_Rn.dtype.itemsize)


# -- shape ---------------------------------------------------------------------------------------

Outline = list[tuple[bytes, int]]


def outline(data: Bytes) -> Outline:
    """One direction of a connection without its payload bytes: (prefix and header, payload size).

    The one header field that has to be random, ``a_key``, is blanked.
    """
    parts: Outline = []
    at = 0
    while at < len(data):
        _, _, message_type, head, payload = PREFIX.unpack_from(data, at)
        shown = bytes(data[at : at + PREFIX.size + head])
        if message_type == MessageType.OLE_BEGIN:
            key = msgpack.unpackb(shown[PREFIX.size :])["a_key"]
            shown = shown.replace(key, bytes(len(key)))
        parts.append((shown, payload))
        at += PREFIX.size + head + payload
    if at != len(data):
        raise ValueError(f"a frame is cut off: {len(data)} bytes of {at}")
    return parts


def different_outlines(a: Outline, b: Outline, what: str) -> list[str]:
    """Whether two conversations differ in frame types, header bytes, sizes, counts or order."""
    if len(a) != len(b):
        return [f"{what}: {len(a)} frames against {len(b)}"]
    for number, (first, second) in enumerate(zip(a, b, strict=True)):
        if first != second:
            return [f"{what}: frame {number} is {first} against {second}"]
    return []


def online_outlines(recordings: Sequence[Recording], upward: bool) -> list[Outline]:
    """Outlines of a client's own connection, first, and of those for passes of many rows.

    The latter are opened at once, so which of them is first is a race of threads: they are sorted.
    """
    outlines = [outline(r.to_server if upward else r.to_client) for r in recordings]
    return [*outlines[:1], *sorted(outlines[1:])]


def different_conversations(
    a: Sequence[Recording], b: Sequence[Recording], *, upward: bool = True
) -> list[str]:
    """Whether the online connections of two clients differ in number or in any outline."""
    first, second = online_outlines(a, upward), online_outlines(b, upward)
    what = "sent" if upward else "received"
    if len(first) != len(second):
        return [f"{what}: over {len(first)} connections against {len(second)}"]
    findings = []
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        findings += different_outlines(one, other, f"{what}, connection {number}")
    return findings


def exchange_outlines(recordings: Sequence[Recording]) -> list[tuple[Outline, Outline]]:
    """Outlines of every preparation exchange, both directions, sorted.

    Two connections share the maps between them, and which takes which is a race of threads; what
    is compared is every exchange by itself.
    """
    exchanges = []
    for recording in recordings:
        up = _split(outline(recording.to_server), MessageType.OLE_BEGIN)
        down = outline(recording.to_client)[1:]  # after WELCOME
        for part in up:
            exchanges.append((part, [answer for answer in down if _map(answer) == _map(part[0])]))
    return sorted(exchanges)


def _map(frame: tuple[bytes, int]) -> int:
    return int(msgpack.unpackb(frame[0][PREFIX.size :])["map_index"])


def _split(parts: Outline, begin: MessageType) -> list[Outline]:
    """The frames from each ``begin`` to the one before the next."""
    starts = [i for i, (head, _) in enumerate(parts) if PREFIX.unpack_from(head)[2] == begin]
    return [parts[first:last] for first, last in pairwise([*starts, len(parts)])]


def repeated_keys(recordings: Sequence[Recording]) -> list[str]:
    """Whether an ``a_key`` was used for two exchanges."""
    keys = [
        frame.header["a_key"]
        for recording in recordings
        for frame in Recording.frames(recording.to_server)
        if frame.type == MessageType.OLE_BEGIN
    ]
    again = len(keys) - len(set(keys))
    return [f"{again} of {len(keys)} a_keys are repetitions"] if again else []


# -- resending -----------------------------------------------------------------------------------


def changed_resends(recordings: Sequence[Recording]) -> list[str]:
    """Whether a request that was in flight when a connection broke came back changed.

    Args:
        recordings: the connections of one client, in order; several may have been open at once.
    """
    findings = []
    begun = [_from_first_linear(bytes(r.to_server)) for r in recordings]
    for number, broken in enumerate(recordings):
        pending = _pending(broken)
        if pending is not None and not any(b.startswith(pending) for b in begun[number + 1 :]):
            findings.append(f"no later connection repeats what {number} had begun")
    return findings


def masked_requests(recordings: Sequence[Recording]) -> list[Frame]:
    """All complete masked requests of a client in order, with repetitions."""
    return [
        frame
        for recording in recordings
        for frame in Recording.frames(recording.to_server)
        if frame.type == MessageType.LINEAR
    ]


def without_resends(recordings: Sequence[Recording]) -> list[Frame]:
    """The complete masked requests of a client, without those that were sent again after a cut.

    Sent again is the first request of a connection that equals the unanswered last one of an
    earlier connection, each of which can be repeated once. Anything else that occurs twice stays.
    """
    frames: list[Frame] = []
    unanswered: list[bytes] = []
    for recording in recordings:
        requests = masked_requests([recording])
        begun = _from_first_linear(bytes(recording.to_server))
        repeated = next((p for p in unanswered if begun.startswith(p)), None)
        whole = repeated is not None and _is_complete(repeated)
        if repeated is not None:
            unanswered.remove(repeated)
        frames += requests[1:] if whole else requests
        pending = _pending(recording)
        if pending is not None:
            unanswered.append(pending)
    return frames


def _is_complete(frame: bytes) -> bool:
    return len(Recording.frames(frame)) == 1


def _pending(recording: Recording) -> bytes | None:
    """The last request on the wire that was not answered in full, as far as it was sent."""
    requests, at = [], 0
    data = recording.to_server
    while at + PREFIX.size <= len(data):
        _, _, message_type, head, payload = PREFIX.unpack_from(data, at)
        end = at + PREFIX.size + head + payload
        if message_type == MessageType.LINEAR:
            requests.append(bytes(data[at:end]))
        at = end
    answers = [f for f in Recording.frames(recording.to_client) if f.type == MessageType.RESULT]
    return requests[-1] if len(requests) > len(answers) else None


def _from_first_linear(data: bytes) -> bytes:
    """The bytes from the first masked request on."""
    at = 0
    while at + PREFIX.size <= len(data):
        _, _, message_type, head, payload = PREFIX.unpack_from(data, at)
        if message_type == MessageType.LINEAR:
            return data[at:]
        at += PREFIX.size + head + payload
    return b""
