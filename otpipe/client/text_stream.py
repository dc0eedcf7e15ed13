"""Text from tokens as they arrive, character for character what decoding all of them gives.

``tokenizers.decoders.DecodeStream`` is not used: with byte-fallback vocabularies (Llama 1 and 2) it
fails, or prints other text than ``decode``, as soon as a run of byte tokens is no valid UTF-8,
because there a later byte changes how the earlier ones of its run decode.
"""

from __future__ import annotations

import codecs
import json
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SENTENCEPIECE_SPACE = "\u2581"
_BYTE_TOKEN_CHARACTERS = len("<0xE4>")
_MAX_STRIP = 16  # characters off the beginning of the text; Llama strips one


class TextStream:
    """Decodes one generated text token by token.

    The pieces of :meth:`push` and :meth:`finish` joined are exactly
    ``tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)``.
    A piece never ends within a character. The cost of a token does not grow with the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._special = {
            token.content
            for token in self._backend.get_added_tokens_decoder().values()
            if token.special
        }
        self._pieces = _pieces_for(self._backend.decoder)

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; often a word, sometimes empty."""
        token = self._backend.id_to_token(token_id)
        # decode() drops special and unknown ids before anything else looks at their neighbours.
        if token is None or token in self._special:
            return ""
        return self._pieces.push(token)

    def finish(self) -> str:
        """What was held back, and an end to the text; the next token starts a new one."""
        return self._pieces.finish()


class _Pieces(Protocol):
    """The incremental form of one kind of decoder, over token strings."""

    def push(self, token: str) -> str: ...

    def finish(self) -> str: ...


def decodes_token_by_token(decoder: Any) -> bool:
    """Whether :class:`TextStream` shows text with its tokens, at a cost bounded by their length.

    decoder: of a ``tokenizers.Tokenizer``. With every other, all of the text comes at the end.
    """
    return not isinstance(_pieces_for(decoder), _WholeText)


def _pieces_for(decoder: Any) -> _Pieces:
    if decoder is None:  # tokenizers joins the tokens with spaces then
        return _WholeText(" ".join)
    steps = _flat_steps(json.loads(decoder.__getstate__()))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _ByteLevelPieces()
    if kinds == ["Metaspace"] or _is_sentencepiece(steps):
        return _SentencePiecePieces(decoder)
    return _WholeText(decoder.decode)


def _flat_steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _flat_steps(part)]


def _is_sentencepiece(steps: list[dict[str, Any]]) -> bool:
    """Replace the space mark, byte fallback, fuse, strip at the left: some of these, in order."""
    allowed = ["Replace", "ByteFallback", "Fuse", "Strip"]
    kinds = [step["type"] for step in steps]
    if not kinds or kinds != [kind for kind in allowed if kind in kinds]:
        return False
    by_kind = {step["type"]: step for step in steps}
    replace, strip = by_kind.get("Replace"), by_kind.get("Strip")
    if replace is not None and (
        replace["pattern"] != {"String": _SENTENCEPIECE_SPACE} or replace["content"] != " "
    ):
        return False
    # Without Fuse every token would be stripped; with stop > 0 the end of the text would be. What
    # is stripped from the beginning is decoded again with each token until there is more.
    return strip is None or (
        "Fuse" in kinds and strip["stop"] == 0 and strip["start"] <= _MAX_STRIP
    )


class _ByteLevelPieces:
    """GPT-2 byte-level BPE (Qwen 2, Llama 3): each token stands for some bytes of UTF-8."""

    def __init__(self) -> None:
        self._byte_of = _byte_of_character()
        # Replaces each maximal invalid part by one U+FFFD, as Rust's from_utf8_lossy does.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> str:
        try:
            data = bytes([self._byte_of[character] for character in token])
        except KeyError:  # an added token outside the alphabet stands for itself
            data = token.encode("utf-8")
        return self._utf8.decode(data)

    def finish(self) -> str:
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class _SentencePiecePieces:
    """SentencePiece (Llama 1 and 2): words with a space mark, and byte tokens ``<0xE4>``.

    A run of byte tokens decodes as a whole, all of it to U+FFFD if any of it is invalid, so it is
    held until another token ends it. Only the beginning of the text is treated unlike the rest
    (its space is stripped), so each segment is decoded behind that beginning, never behind all.
    """

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._start()

    def _start(self) -> None:
        self._head: list[str] = []  # tokens from the start until they give a first character
        self._head_text = ""
        self._held: list[str] = []

    def push(self, token: str) -> str:
        self._held.append(token)
        # Some other tokens look like this too; holding them as well changes nothing in the text.
        if len(token) == _BYTE_TOKEN_CHARACTERS and token.startswith("<0x") and token.endswith(">"):
            return ""
        return self._flush()

    def finish(self) -> str:
        rest = self._flush()
        self._start()
        return rest

    def _flush(self) -> str:
        tokens = self._head + self._held
        text: str = self._decoder.decode(tokens)
        piece = text[len(self._head_text) :]
        if not self._head_text:
            self._head, self._head_text = tokens, text
        self._held = []
        return piece


class _WholeText:
    """A decoder of another kind may change any of its text later: all of it comes at the end."""

    def __init__(self, decode: Any) -> None:
        self._decode = decode
        self._tokens: list[str] = []

    def push(self, token: str) -> str:
        self._tokens.append(token)
        return ""

    def finish(self) -> str:
        tokens, self._tokens = self._tokens, []
        text: str = self._decode(tokens)
        return text


def _byte_of_character() -> dict[str, int]:
    """The alphabet of GPT-2's byte-level BPE: bytes without a printable Latin-1 form move up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(moved)
    }
