"""Streamed text is, piece by piece, what decoding all tokens at once gives."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_cases import (
    SPM_WORDS,
    TEXTS,
    byte_level_backend,
    sample_files,
    sentencepiece_backend,
)
from tokenizers import Tokenizer, decoders, models

from otpipe.client.text_stream import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _with(backend: Tokenizer, decoder: decoders.Decoder) -> Tokenizer:
    backend.decoder = decoder
    return backend


def _without_decoder() -> Tokenizer:
    return Tokenizer(models.WordLevel({str(n): n for n in range(300)}, unk_token="0"))


SPACES = decoders.Replace("\u2581", " ")
BACKENDS = {
    "sample": lambda: Tokenizer.from_str(sample_files()["tokenizer.json"].decode()),
    "byte_level": byte_level_backend,
    "byte_level_in_sequence": lambda: _with(
        byte_level_backend(), decoders.Sequence([decoders.ByteLevel()])
    ),
    "llama2": sentencepiece_backend,
    "llama2_unstripped": lambda: sentencepiece_backend(
        decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse()])
    ),
    "llama2_strips_three": lambda: sentencepiece_backend(
        decoders.Sequence(
            [SPACES, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 3, 0)]
        )
    ),
    "metaspace": lambda: sentencepiece_backend(decoders.Metaspace()),
    "metaspace_never": lambda: sentencepiece_backend(decoders.Metaspace(prepend_scheme="never")),
    # Kinds that are not streamed, and still right.
    "replace_across_tokens": lambda: sentencepiece_backend(
        decoders.Sequence([SPACES, decoders.Fuse(), decoders.Replace("  ", "_")])
    ),
    "strip_each": lambda: sentencepiece_backend(
        decoders.Sequence([SPACES, decoders.Strip(" ", 1, 0)])
    ),
    "wordpiece": lambda: sentencepiece_backend(decoders.WordPiece()),
    "none": _without_decoder,
}
STREAMED = [name for name in BACKENDS if name.startswith(("sample", "byte", "llama", "meta"))]


@pytest.fixture(scope="module", params=BACKENDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return wrapped(BACKENDS[request.param]())


@pytest.fixture(scope="module", params=STREAMED)
def streamed(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return wrapped(BACKENDS[request.param]())


def stream_text(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token_id) for token_id in token_ids), stream.finish()]


def expected_text(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> str:
    text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def ids_of(tokenizer: PreTrainedTokenizerFast, words: list[str]) -> list[int]:
    """The ids of those words that are tokens."""
    known = (tokenizer.backend_tokenizer.token_to_id(word) for word in words)
    return [token_id for token_id in known if token_id is not None]


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_random_tokens(tokenizer: PreTrainedTokenizerFast, data: st.DataObject) -> None:
    """Mostly invalid UTF-8, special tokens, and ids that no token has."""
    size = len(tokenizer)
    token_ids = data.draw(
        st.lists(
            st.integers(0, 270) | st.integers(0, size + 3) | st.integers(size - 20, size - 1),
            max_size=40,
        )
    )
    assert "".join(stream_text(tokenizer, token_ids)) == expected_text(tokenizer, token_ids)


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=60) | st.text("a b你😀é\u200d\ufffd\n", max_size=40))
@example(text="".join(TEXTS))
@example(text="  你  ")
@example(text="\ufffd")
def test_random_unicode(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(stream_text(tokenizer, token_ids)) == expected_text(tokenizer, token_ids)


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_ends_within_a_character(streamed: PreTrainedTokenizerFast, text: str) -> None:
    token_ids = streamed.encode(text, add_special_tokens=False)
    pieces = stream_text(streamed, token_ids)
    whole = expected_text(streamed, token_ids)
    assert "".join(pieces) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None, max_examples=100)
@given(words=st.lists(st.sampled_from([*SPM_WORDS, "<0xE4>", "<0xBD>", "<0xA0>", "<0x20>", "<s>"])))
@example(words=["<0xE4>", "<0xBD>", "<0xA0>", "<0xFF>", "b"])  # takes the character back
@example(words=["<0xE4>", "<0xBD>", "<s>", "<0xA0>", "b"])  # a skipped token parts no run
@example(words=["\u2581", "\u2581\u2581", "\u2581a"])
def test_byte_runs_and_leading_spaces(streamed: PreTrainedTokenizerFast, words: list[str]) -> None:
    token_ids = ids_of(streamed, words)
    assert "".join(stream_text(streamed, token_ids)) == expected_text(streamed, token_ids)


def test_words_come_at_once(streamed: PreTrainedTokenizerFast) -> None:
    """Nothing is held back that could be shown: an ASCII word is out with its last token."""
    stream = TextStream(streamed)
    token_ids = streamed.encode("a the b", add_special_tokens=False)
    shown = ""
    for count, token_id in enumerate(token_ids, start=1):
        shown += stream.push(token_id)
        pending = expected_text(streamed, token_ids[:count])
        ends_in_byte = str(streamed.convert_ids_to_tokens(token_id)).startswith("<0x")
        assert ends_in_byte or shown == pending


def test_a_split_emoji_comes_whole() -> None:
    tokenizer = wrapped(byte_level_backend())
    alphabet = {token: n for token, n in tokenizer.get_vocab().items() if len(token) == 1}
    from otpipe.client.text_stream import _byte_of_character

    by_byte = {byte: alphabet[character] for character, byte in _byte_of_character().items()}
    pieces = stream_text(tokenizer, [by_byte[byte] for byte in "😀!".encode()])
    assert pieces == ["", "", "", "😀", "!", ""]
    pieces = stream_text(tokenizer, [by_byte[byte] for byte in b"\xf0\x9f"])
    assert pieces == ["", "", "\ufffd"]


def test_special_tokens_are_skipped_and_added_ones_shown() -> None:
    tokenizer = wrapped(byte_level_backend())
    words = ["<|im_start|>", "a", "<think>", "<|im_end|>", "two words", "<|endoftext|>"]
    assert stream_text(tokenizer, ids_of(tokenizer, words)) == [
        "",
        "a",
        "<think>",
        "",
        "two words",
        "",
        "",
    ]


def test_finish_starts_a_new_text(tokenizer: PreTrainedTokenizerFast) -> None:
    token_ids = tokenizer.encode(" a the b你", add_special_tokens=False)
    stream = TextStream(tokenizer)
    texts = ["".join([*map(stream.push, token_ids), stream.finish()]) for _ in range(2)]
    assert texts == [expected_text(tokenizer, token_ids)] * 2


@pytest.mark.parametrize("kind", ["valid", "invalid"])
def test_cost_does_not_grow_with_the_text(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    """Ten times the tokens, far less than a hundred times the time."""
    unit = [n % 300 for n in range(0, 900, 7)] if kind == "valid" else [4] * 100

    def seconds(repeats: int) -> float:
        start = time.process_time()
        stream_text(tokenizer, unit * repeats)
        return time.process_time() - start

    seconds(1)
    assert seconds(100) < 40 * seconds(10) + 0.1
