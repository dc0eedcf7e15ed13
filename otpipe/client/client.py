"""The client library: ``with Client("host:7431") as client: client.generate("...")``."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from otpipe.client.generation import Generation, OnlineMeter
from otpipe.client.link import LinkOptions, ServerAddress, ServerLink
from otpipe.client.masked_executor import MaskedExecutor
from otpipe.client.preparation import PreparationReport, Progress, prepare_slots
from otpipe.client.prompt import PromptEncoder
from otpipe.client.row_executor import RowExecutor
from otpipe.client.row_streams import RowStreams
from otpipe.client.sampling import Sampler, SamplingParams
from otpipe.client.store import MapShape, PadStore, SlotDamaged, default_root
from otpipe.client.text_stream import TextStream
from otpipe.errors import ConnectionLost, FingerprintMismatch, ProtocolError, UsageError
from otpipe.model.bundle import ModelBundle
from otpipe.model.clear_ops import KVCache
from otpipe.model.program import LogitsFor, forward
from otpipe.protocol.messages import Bundle, GetBundle, MessageType
from otpipe.protocol.wire import MAX_PAYLOAD_BYTES, Header

log = logging.getLogger("otpipe.client")

PREFILL_ROWS = 512
"""Prompt positions that go through the model at once; bounds the memory of a long prompt."""

DEFAULT_BATCH_SLOTS = 2048

MIN_FINGERPRINT_DIGITS = 32
"""Of a fingerprint that the user gives; another model that agrees in 16 could be searched for."""

MAX_DAMAGED_PASSES = 3
"""Passes that may fail on damaged slots before the client gives up."""


class Client:
    """A private conversation with one model.

    Args:
        server: ``HOST:PORT``, or several replicas separated by commas.
        store: directory for pads and the model's public description; None: the user's data
            directory. It holds secrets; its files are readable by the owner alone.
        ca: PEM file of the authority behind the server's certificate; turns TLS on.
        fingerprint: accept a server only if it holds these weights, tokenizer and chat template
            (SHA-256, hex, or its first 32 digits or more). Without it the server chooses them.
        retry_for_s: how long a lost server is sought.
        on_prepare: progress of preparation, (done, total) bytes on the wire.

    Raises:
        ConnectionLost, ProtocolError, FingerprintMismatch, StoreError, UsageError: as they say.
    """

    def __init__(
        self,
        server: str,
        store: str | Path | None = None,
        *,
        ca: str | None = None,
        fingerprint: str | None = None,
        retry_for_s: float = 30.0,
        on_prepare: Progress | None = None,
        link_options: LinkOptions | None = None,
    ) -> None:
        self._options = link_options or LinkOptions(
            ServerAddress.parse_list(server), ca=ca, retry_for_s=retry_for_s
        )
        self._root = Path(store) if store is not None else default_root().parent
        self._on_prepare = on_prepare
        self._link = ServerLink(self._options)
        try:
            self._check_fingerprint(fingerprint)
            self.bundle = self._load_bundle()
            shapes = tuple(
                MapShape(m.index, m.in_features, m.out_features, m.ring_bytes)
                for m in self.bundle.spec.maps
            )
            self._store = PadStore.open(
                self._root / "pads",
                self.bundle.fingerprint,
                shapes,
                on_warning=lambda problem: log.warning("%s", problem),
            )
        except BaseException:
            self._link.close()
            raise
        self._encoder: PromptEncoder | None = None
        self.executor = MaskedExecutor(self.bundle, self._store, self._link)
        self.row_executor = RowExecutor(self.bundle, self._store, self._link)
        self._streams = RowStreams(
            self.bundle, self._store, self._link, self._options, self.executor
        )
        self.last: Generation | None = None
        """The latest generation, complete or not."""

    # -- life ------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the server and unlock the store. Safe to call twice."""
        self._link.close()
        self._store.close()

    # -- facts -----------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the server's model; pads are bound to it."""
        return self.bundle.fingerprint

    @property
    def free_slots(self) -> int:
        """Token positions that can be computed before more must be prepared."""
        return self._store.free_slots

    def info(self) -> dict[str, object]:
        """The server's model and this client's slots, as plain values."""
        spec, welcome = self.bundle.spec, self._link.welcome
        up = sum(m.in_features * m.ring_bytes for m in spec.maps)
        down = sum(m.out_features * m.ring_bytes for m in spec.maps)
        return {
            "server": welcome.server,
            "weights": welcome.weights,
            "ranks": welcome.num_ranks,
            "fingerprint": self.bundle.fingerprint,
            "family": spec.family,
            "layers": spec.num_layers,
            "hidden_size": spec.hidden_size,
            "vocab_size": spec.vocab_size,
            "max_positions": spec.max_positions,
            "bytes_up_a_token": up,
            "bytes_down_a_token": down,
            "round_trips_a_token": len(spec.maps),
            "store_bytes_a_slot": down,
            "free_slots": self.free_slots,
        }

    # -- work ------------------------------------------------------------------------------------

    def prepare(self, num_slots: int = DEFAULT_BATCH_SLOTS) -> PreparationReport:
        """Prepare at least ``num_slots`` more slots; needs no prompt.

        Raises:
            UsageError: fewer than one slot.
            StoreError, ConnectionLost: finished batches stay usable.
        """
        if num_slots < 1:
            raise UsageError(f"{num_slots} slots were asked for; ask for at least 1")
        return prepare_slots(self._store, self.bundle, self._options, num_slots, self._on_prepare)

    def forward(self, token_ids: Sequence[int]) -> Tensor:
        """Logits of every position of one sequence.

        Args:
            token_ids: the tokens at positions 0, 1, ...

        Returns:
            float32 (T, vocab) on the CPU.
        """
        tokens = [int(token) for token in token_ids]
        self._ensure_slots(len(tokens))
        cache = self.executor.new_cache()
        parts = [
            self._pass(tokens[first : first + PREFILL_ROWS], cache, "all")
            for first in range(0, max(1, len(tokens)), PREFILL_ROWS)
        ]
        return torch.cat([part for part in parts if part is not None])

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        raw: bool = False,
        hide_length: bool = False,
    ) -> Iterator[str]:
        """Generate text piece by piece; :attr:`last` has tokens, reason and figures.

        Args:
            max_new_tokens: at most so many; the model's context may end it earlier.
            temperature: 0 is greedy.
            top_p, top_k: 1.0 and 0 switch them off.
            seed: repeatable sampling. It is no secret and protects nothing.
            raw: do not apply the chat template.
            hide_length: go on to ``max_new_tokens`` in silence after the model has ended its
                answer, so that the number of requests does not tell the answer's length. Their
                timing may: text is decoded, and taken by the caller, between them.

        Yields:
            Text that never ends inside a character.

        Raises:
            UsageError: a parameter out of range, or a prompt longer than the model's context.
            ConnectionLost: the server stayed away; :attr:`last` keeps what was generated.
        """
        params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        prompt_ids = self.encode(prompt, raw=raw)
        return self._generate_text(prompt_ids, max_new_tokens, params, hide_length)

    def generate_ids(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int = 256,
        *,
        params: SamplingParams | None = None,
        stop_token_ids: Collection[int] = (),
        hide_length: bool = False,
    ) -> Iterator[int]:
        """Generate token by token, without a tokenizer; see :meth:`generate`.

        Args:
            prompt_ids: at least one token id of the model.
            params: sampling; None is greedy.
            stop_token_ids: end at one of these; it is not yielded.
        """
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
        room = self.bundle.spec.max_positions - len(prompt_ids)
        if room < 0:
            raise UsageError(
                f"the prompt has {len(prompt_ids)} tokens and the model "
                f"{self.bundle.spec.max_positions} positions; shorten the prompt"
            )
        # The last token generated is never fed back, so it needs neither position nor slot.
        limit = min(max_new_tokens, room + 1)
        sampler = Sampler(params or SamplingParams())
        return self._generate_ids(list(prompt_ids), limit, sampler, stop_token_ids, hide_length)

    def encode(self, prompt: str, *, raw: bool = False) -> list[int]:
        """Token ids of a prompt, with the model's chat template unless ``raw``."""
        return self._prompt_encoder().encode(prompt, raw=raw)

    # -- inside ----------------------------------------------------------------------------------

    def _generate_text(
        self, prompt_ids: list[int], max_new_tokens: int, params: SamplingParams, hide_length: bool
    ) -> Iterator[str]:
        encoder = self._prompt_encoder()
        stream = TextStream(encoder.tokenizer)
        tokens = self.generate_ids(
            prompt_ids,
            max_new_tokens,
            params=params,
            stop_token_ids=encoder.stop_token_ids,
            hide_length=hide_length,
        )
        for token in tokens:
            piece = stream.push(token)
            assert self.last is not None
            self.last.text += piece
            if piece:
                yield piece
        rest = stream.finish()
        assert self.last is not None
        self.last.text += rest
        if rest:
            yield rest

    def _generate_ids(
        self,
        prompt_ids: list[int],
        limit: int,
        sampler: Sampler,
        stop_token_ids: Collection[int],
        hide_length: bool,
    ) -> Iterator[int]:
        generation = self.last = Generation(prompt_tokens=len(prompt_ids))
        generation.stats.prepare_s = self._ensure_slots(len(prompt_ids) + limit - 1)
        meter = OnlineMeter(self._link, self._slots_used, generation)
        cache = self.executor.new_cache()
        pending = prompt_ids
        try:
            while generation.finish_reason is None:
                token = sampler.choose(self._next_logits(pending, cache))
                pending = [token]
                meter.token_done()
                if token in stop_token_ids:
                    generation.finish_reason = "stop"
                    if hide_length:
                        # The same steps as before, so that a wrong answer ends both alike.
                        for _ in range(limit - len(generation.token_ids) - 1):
                            token = sampler.choose(self._next_logits([token], cache))
                    break
                generation.token_ids.append(token)
                if len(generation.token_ids) == limit:
                    generation.finish_reason = "length"
                yield token
        except ConnectionLost:
            generation.finish_reason = "connection_lost"
            raise
        finally:
            meter.stop()

    def _pass(self, token_ids: list[int], cache: KVCache, wanted: LogitsFor) -> Tensor | None:
        """One pass of the program; repeated on fresh slots where the disk lost a correction."""
        for _ in range(MAX_DAMAGED_PASSES):
            try:
                return self._forward(token_ids, cache, wanted)
            except SlotDamaged as error:
                log.warning("%s; repeating the pass with other slots", error)
        return self._forward(token_ids, cache, wanted)

    def _forward(self, token_ids: list[int], cache: KVCache, wanted: LogitsFor) -> Tensor | None:
        if len(token_ids) > 1:
            return self._streams.forward(token_ids, cache, wanted)
        logits = forward(self.row_executor, token_ids, cache, wanted)
        return None if logits is None else torch.from_numpy(logits)

    def _slots_used(self) -> int:
        return self.executor.slots_used + self.row_executor.slots_used

    def _next_logits(self, token_ids: list[int], cache: KVCache) -> np.ndarray:
        """float32 (vocab,) after ``token_ids``; a long prompt goes in chunks."""
        for first in range(0, len(token_ids), PREFILL_ROWS):
            chunk = token_ids[first : first + PREFILL_ROWS]
            last = first + PREFILL_ROWS >= len(token_ids)
            logits = self._pass(chunk, cache, "last" if last else "none")
        assert logits is not None
        return logits[0].numpy()

    def _ensure_slots(self, needed: int) -> float:
        """Prepare what is missing; returns the seconds it took."""
        missing = needed - self.free_slots
        if missing <= 0:
            return 0.0
        log.info("%d slots are missing; preparing", missing)
        # The upload costs the same for a batch of any size, so a full one is the better bargain.
        return self.prepare(max(missing, DEFAULT_BATCH_SLOTS)).seconds

    def _prompt_encoder(self) -> PromptEncoder:
        if self._encoder is None:
            self._encoder = PromptEncoder(
                self.bundle.files,
                self._root / "models",
                self.bundle.fingerprint,
                vocab_size=self.bundle.spec.vocab_size,
            )
        return self._encoder

    def _check_fingerprint(self, wanted: str | None) -> None:
        if wanted is None:
            return
        if len(wanted) < MIN_FINGERPRINT_DIGITS or not set(wanted.lower()) <= set(
            "0123456789abcdef"
        ):
            raise UsageError(
                f"the fingerprint {wanted!r} is not at least {MIN_FINGERPRINT_DIGITS} hex digits; "
                "copy it from `otpipe info`"
            )
        held = self._link.welcome.fingerprint
        if not held.startswith(wanted.lower()):
            raise FingerprintMismatch(
                f"the server holds weights {held}, not the {wanted.lower()} that were asked for; "
                "name a server of those, or check the fingerprint"
            )

    def _load_bundle(self) -> ModelBundle:
        """The public description from the cache, or from the server."""
        welcome = self._link.welcome
        path = self._root / "models" / f"{welcome.bundle_sha256.hex()}.bundle"
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).digest() != welcome.bundle_sha256:
            data = self._download_bundle(welcome.bundle_bytes, welcome.bundle_sha256)
            _write_atomically(path, data)
        bundle = ModelBundle.from_bytes(data)
        if bundle.fingerprint != welcome.fingerprint:
            raise ProtocolError(
                f"the server announced weights {welcome.fingerprint[:16]} and described "
                f"{bundle.fingerprint[:16]}; it contradicts itself, use another server"
            )
        return bundle

    def _download_bundle(self, num_bytes: int, sha256: bytes) -> bytes:
        if num_bytes > MAX_PAYLOAD_BYTES:
            raise ProtocolError(
                f"the server announced a model description of {num_bytes} bytes; at most "
                f"{MAX_PAYLOAD_BYTES} are accepted"
            )

        def due(header: Header) -> int:
            Bundle.parse(header)
            return num_bytes

        data = self._link.request(GetBundle(), b"", MessageType.BUNDLE, due).tobytes()
        if hashlib.sha256(data).digest() != sha256:
            raise ProtocolError(
                "the model description does not have the hash that the server announced; try again"
            )
        return data


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(path)
