"""The client library: ``with Client("host:7431") as client: client.generate("...")``."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from otpipe.client.generation import Generation, OnlineMeter, Text
from otpipe.client.link import LinkOptions, ServerAddress, ServerLink
from otpipe.client.mode import Mode
from otpipe.client.preparation import PreparationReport, Progress
from otpipe.client.prompt import PromptEncoder
from otpipe.client.public_mode import PublicMode
from otpipe.client.sampling import Sampler, SamplingParams
from otpipe.client.store import default_root
from otpipe.client.text_stream import TextStream
from otpipe.errors import ConnectionLost, FingerprintMismatch, ProtocolError, UsageError

if TYPE_CHECKING:
    from otpipe.model.bundle import ModelBundle
    from otpipe.model.private_bundle import PrivateBundle

log = logging.getLogger("otpipe.client")

DEFAULT_BATCH_SLOTS = 2048

MIN_FINGERPRINT_DIGITS = 32
"""Of a fingerprint that the user gives; another model that agrees in 16 could be searched for."""


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
        on_prepare: progress of preparations, (done, total) bytes on the wire: of slots, and of what
            a text with private weights takes besides.

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
            self.mode = self._open_mode()
        except BaseException:
            self._link.close()
            raise
        self._store = self.mode.store
        self._encoder: PromptEncoder | None = None
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
        self.mode.close()

    # -- facts -----------------------------------------------------------------------------------

    @property
    def bundle(self) -> ModelBundle | PrivateBundle:
        """The server's public description of its model."""
        return self.mode.bundle

    @property
    def fingerprint(self) -> str:
        """What pads are bound to, hex: the SHA-256 of a public model; with private weights a
        random number of this start of the server."""
        return self.mode.fingerprint

    @property
    def free_slots(self) -> int:
        """Token positions that can be computed before more must be prepared."""
        return self._store.free_slots

    def info(self) -> dict[str, object]:
        """The server's model and this client's slots, as plain values."""
        spec, welcome = self.mode.spec, self._link.welcome
        return {
            "server": welcome.server,
            "weights": welcome.weights,
            "ranks": welcome.num_ranks,
            "fingerprint": self.fingerprint,
            "family": spec.family,
            "layers": spec.num_layers,
            "hidden_size": spec.hidden_size,
            "vocab_size": spec.vocab_size,
            "max_positions": self.mode.max_positions,
            **self.mode.costs(),
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
        return self.mode.prepare(num_slots, self._on_prepare)

    def warm_up(self, num_positions: int) -> None:
        """Make ready for a text of so many tokens, prompt and answer, before it is known.

        With private weights this opens the session and prepares attention products, which the next
        text uses; without it they are prepared when the text begins. With public weights there is
        nothing to do.

        Raises:
            UsageError: no tokens, or more than the model has positions.
            ConnectionLost: the server stayed away.
        """
        self.mode.expect(self.mode.new_cache(), num_positions, self._on_prepare)

    def forward(self, token_ids: Sequence[int]) -> Tensor:
        """Logits of every position of one sequence.

        Args:
            token_ids: the tokens at positions 0, 1, ...

        Returns:
            float32 (T, vocab) on the CPU.
        """
        tokens = [int(token) for token in token_ids]
        self._ensure_slots(len(tokens))
        cache, step = self.mode.new_cache(), self.mode.prefill_rows
        if tokens:
            self.mode.expect(cache, len(tokens), self._on_prepare)
        parts = [
            self.mode.forward(tokens[first : first + step], cache, "all")
            for first in range(0, max(1, len(tokens)), step)
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
        return self.generate_text(prompt_ids, max_new_tokens, params, hide_length=hide_length)

    def generate_ids(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int = 256,
        *,
        params: SamplingParams | None = None,
        stop_token_ids: Collection[int] = (),
        hide_length: bool = False,
        text: Text | None = None,
    ) -> Iterator[int]:
        """Generate token by token, without a tokenizer; see :meth:`generate`.

        Args:
            prompt_ids: at least one token id of the model.
            params: sampling; None is greedy.
            stop_token_ids: end at one of these; it is not yielded.
            text: from :meth:`new_text`, to go on with; the prompt begins with what it has, and has
                at least one token more. None: a new one.
        """
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
        room = self.mode.max_positions - len(prompt_ids)
        if room < 0:
            raise UsageError(
                f"the prompt has {len(prompt_ids)} tokens and the model "
                f"{self.mode.max_positions} positions; shorten the prompt"
            )
        # The last token generated is never fed back, so it needs neither position nor slot.
        limit = min(max_new_tokens, room + 1)
        sampler = Sampler(params or SamplingParams())
        prompt = [int(token) for token in prompt_ids]
        if text is None:
            text = self.new_text()
        known = len(text.token_ids)
        if prompt[:known] != text.token_ids or (known and known == len(prompt)):
            raise UsageError(
                f"a prompt of {len(prompt)} tokens does not go on with a text of {known}; begin a "
                "new text"
            )
        return self._generate_ids(prompt, text, limit, sampler, stop_token_ids, hide_length)

    def new_text(self) -> Text:
        """An empty text for :meth:`generate_ids`; it grows with what is fed to the model."""
        return Text(self.mode.new_cache())

    def encode(
        self, prompt: str, *, raw: bool = False, history: Sequence[tuple[str, str]] = ()
    ) -> list[int]:
        """Token ids of a prompt, with the model's chat template unless ``raw``.

        ``history``: turns before it, (role, text) each, for the template.
        """
        return self._prompt_encoder().encode(prompt, raw=raw, history=history)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model's files say how a conversation is written."""
        return self._prompt_encoder().has_chat_template

    def generate_text(
        self,
        prompt_ids: list[int],
        max_new_tokens: int,
        params: SamplingParams,
        *,
        hide_length: bool = False,
        text: Text | None = None,
    ) -> Iterator[str]:
        """:meth:`generate_ids`, as text: pieces that never end inside a character."""
        encoder = self._prompt_encoder()
        stream = TextStream(encoder.tokenizer)
        tokens = self.generate_ids(
            prompt_ids,
            max_new_tokens,
            params=params,
            stop_token_ids=encoder.stop_token_ids,
            hide_length=hide_length,
            text=text,
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

    # -- inside ----------------------------------------------------------------------------------

    def _generate_ids(
        self,
        prompt_ids: list[int],
        text: Text,
        limit: int,
        sampler: Sampler,
        stop_token_ids: Collection[int],
        hide_length: bool,
    ) -> Iterator[int]:
        generation = self.last = Generation(prompt_tokens=len(prompt_ids))
        pending = prompt_ids[len(text.token_ids) :]
        generation.stats.prepare_s = self._ensure_slots(len(pending) + limit - 1)
        meter = OnlineMeter(self.mode, generation)
        try:
            self.mode.expect(text.cache, len(prompt_ids) + limit - 1, self._on_prepare)
            while generation.finish_reason is None:
                token = sampler.choose(self._next_logits(pending, text))
                pending = [token]
                meter.token_done()
                if token in stop_token_ids:
                    generation.finish_reason = "stop"
                    if hide_length:
                        # The same steps as before, so that a wrong answer ends both alike.
                        for _ in range(limit - len(generation.token_ids) - 1):
                            token = sampler.choose(self._next_logits([token], text))
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

    def _next_logits(self, token_ids: list[int], text: Text) -> np.ndarray:
        """float32 (vocab,) after ``token_ids`` more; a long prompt goes in chunks."""
        step = self.mode.prefill_rows
        for first in range(0, len(token_ids), step):
            last = first + step >= len(token_ids)
            chunk = token_ids[first : first + step]
            logits = self.mode.forward(chunk, text.cache, "last" if last else "none")
            text.token_ids += chunk
        assert logits is not None
        return logits[0].numpy()

    def _ensure_slots(self, needed: int) -> float:
        """Prepare what is missing; returns the seconds it took."""
        missing = needed - self.free_slots
        if missing <= 0:
            return 0.0
        log.info("%d slots are missing; preparing", missing)
        # The upload costs the same for a batch of any size, so a full one is the better bargain.
        return self.prepare(max(missing, self.mode.batch_slots)).seconds

    def _prompt_encoder(self) -> PromptEncoder:
        if self._encoder is None:
            self._encoder = PromptEncoder(
                self.mode.files,
                self._root / "models",
                self.fingerprint,
                vocab_size=self.mode.spec.vocab_size,
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

    def _open_mode(self) -> Mode:
        """Public or private weights, as the server says."""
        weights = self._link.welcome.weights
        if weights == "public":
            return PublicMode(self._link, self._options, self._root)
        if weights == "private":
            from otpipe.client.private_mode import PrivateMode  # a few hundred ms, for who needs it

            return PrivateMode(self._link, self._options, self._root)
        raise ProtocolError(
            f"the server serves weights of kind {weights!r:.40}, which this client does not know; "
            "install the otpipe release of the server"
        )
