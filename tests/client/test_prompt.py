"""Prompts to tokens, from files that an untrusted server may have written."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizer_cases import (
    CHAT_TEMPLATE,
    FINGERPRINT,
    TEXTS,
    byte_level_files,
    sample_files,
    sentencepiece_files,
)

from otpipe.client.prompt import TOKENIZER_FILES, PromptEncoder
from otpipe.client.text_stream import TextStream
from otpipe.errors import CheckpointError, UsageError


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"a connection to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def encoder_of(files: dict[str, bytes], cache_dir: Path, **options: int) -> PromptEncoder:
    return PromptEncoder(files, cache_dir, FINGERPRINT, **options)


def with_config(files: dict[str, bytes], **settings: object) -> dict[str, bytes]:
    config = json.loads(files["tokenizer_config.json"]) | settings
    return {**files, "tokenizer_config.json": json.dumps(config).encode()}


# --- encoding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make_files", [sample_files, byte_level_files, sentencepiece_files])
def test_same_ids_as_transformers(
    make_files: Callable[[], dict[str, bytes]], text: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    files = make_files()
    original = tmp_path / "original"
    original.mkdir()
    for name, content in files.items():
        (original / name).write_bytes(content)
    expected = AutoTokenizer.from_pretrained(original)(text)["input_ids"]
    assert encoder_of(files, tmp_path / "cache").encode(text) == expected


def test_chat_template_wraps_the_prompt_unless_raw(tmp_path: Path) -> None:
    encoder = encoder_of(byte_level_files(CHAT_TEMPLATE), tmp_path)
    assert encoder.has_chat_template
    token_ids = encoder.encode("let there be")
    assert encoder.tokenizer.decode(token_ids) == (
        "<|im_start|>user\nlet there be<|im_end|>\n<|im_start|>assistant\n"
    )
    assert encoder.tokenizer.decode(encoder.encode("let there be", raw=True)) == "let there be"


def test_chat_template_in_the_tokenizer_config(tmp_path: Path) -> None:
    files = byte_level_files(chat_template=None)
    encoder = encoder_of(with_config(files, chat_template=CHAT_TEMPLATE), tmp_path)
    assert str(encoder.tokenizer.decode(encoder.encode("x"))).startswith("<|im_start|>user\nx")


def test_without_a_template_raw_makes_no_difference(tmp_path: Path) -> None:
    encoder = encoder_of(sample_files(), tmp_path)
    assert not encoder.has_chat_template
    assert encoder.encode(TEXTS[0]) == encoder.encode(TEXTS[0], raw=True)


def test_usual_special_tokens_are_added_to_raw_prompts_only_once(tmp_path: Path) -> None:
    bos = "<|endoftext|>"
    template = "{{ bos_token }}" + CHAT_TEMPLATE
    encoder = encoder_of(byte_level_files(template, bos=bos), tmp_path)
    bos_id = encoder.tokenizer.bos_token_id
    for raw in (True, False):
        token_ids = encoder.encode("let there be", raw=raw)
        assert token_ids[0] == bos_id
        assert token_ids.count(bos_id) == 1


def test_prompts_longer_than_the_tokenizer_expects_are_whole_and_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = byte_level_files()  # model_max_length 16
    backend = json.loads(files["tokenizer.json"])
    backend["truncation"] = {
        "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    files["tokenizer.json"] = json.dumps(backend).encode()
    encoder = encoder_of(files, tmp_path)
    text = " ".join(TEXTS)
    assert encoder.tokenizer.decode(encoder.encode(text)) == text
    assert capfd.readouterr() == ("", "")


def test_empty_prompt(tmp_path: Path) -> None:
    bos = "<|endoftext|>"
    assert encoder_of(byte_level_files(CHAT_TEMPLATE), tmp_path / "a").encode("")
    assert len(encoder_of(byte_level_files(bos=bos), tmp_path / "b").encode("")) == 1
    with pytest.raises(UsageError, match="The prompt is empty and this model has no beginning"):
        encoder_of(sample_files(), tmp_path / "c").encode("")


def test_prompt_that_is_no_unicode(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not valid Unicode \(U\+DCFF at position 3\)"):
        encoder_of(sample_files(), tmp_path).encode("abc\udcff")


def test_tokens_that_the_model_lacks(tmp_path: Path) -> None:
    encoder = encoder_of(byte_level_files(), tmp_path, vocab_size=100)
    with pytest.raises(CheckpointError, match="but the model has only 100 tokens"):
        encoder.encode("<think>")


def test_the_tokenizer_streams_back_what_was_encoded(tmp_path: Path) -> None:
    """Clean-up of spaces is asked for by the files, and must not show."""
    encoder = encoder_of(byte_level_files(), tmp_path)
    text = "spaces , here . do n't vanish !"
    stream = TextStream(encoder.tokenizer)
    pieces = [stream.push(token_id) for token_id in encoder.encode(text)]
    assert "".join(pieces) + stream.finish() == text
    assert encoder.tokenizer.decode(encoder.encode(text)) == text


# --- stop tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, {2}),
        (b'{"eos_token_id": 0}', None, {0, 2}),
        (b'{"eos_token_id": [0, 7]}', b'{"model_type": "qwen2", "eos_token_id": 9}', {0, 2, 7, 9}),
        (b'{"eos_token_id": null}', b'{"model_type": "qwen2"}', {2}),
    ],
)
def test_stop_tokens_are_all_that_are_named(
    generation: bytes | None, config: bytes | None, expected: set[int], tmp_path: Path
) -> None:
    files = byte_level_files()
    if generation is not None:
        files["generation_config.json"] = generation
    if config is not None:
        files["config.json"] = config
    assert encoder_of(files, tmp_path).stop_token_ids == expected


@pytest.mark.parametrize("value", ['"2"', "true", "-1", "[1, null]", "1.5", "{}"])
def test_stop_tokens_that_are_none(value: str, tmp_path: Path) -> None:
    files = byte_level_files() | {"generation_config.json": f'{{"eos_token_id": {value}}}'.encode()}
    with pytest.raises(CheckpointError, match=r"has eos_token_id .* which must be token ids"):
        _ = encoder_of(files, tmp_path).stop_token_ids


# --- files that cannot be used, or mean harm ----------------------------------------------------


def test_known_files_are_those_of_a_bundle() -> None:
    from otpipe.model.bundle import PUBLIC_FILES

    assert set(PUBLIC_FILES) == TOKENIZER_FILES


@pytest.mark.parametrize("name", ["../evil.json", "tokenization_evil.py", "a/b.json", "x.model"])
def test_unknown_file_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no known tokenizer file; use added_tokens"):
        encoder_of({**byte_level_files(), name: b"{}"}, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"", "The tokenizer of the model cannot be loaded"),
        ("tokenizer.json", b"{}", "The tokenizer of the model cannot be loaded"),
        ("tokenizer.json", b'{"version": "1.0", "model": 3}', "cannot be loaded"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json of the model is no JSON"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json of the model is no JSON object"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json of the model is no JSON"),
        ("tokenizer_config.json", b"[" * 10**5, "is no JSON"),
        ("config.json", b'{"model_type": "bert"}', "model_type 'bert'; supported are llama, qwen2"),
        ("config.json", b"{}", "model_type None; supported are llama, qwen2"),
    ],
)
def test_damaged_files_are_one_clear_sentence(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        encoder_of({**byte_level_files(), name: content}, tmp_path)
    assert "\n" not in str(caught.value)
    assert "checkpoint" in str(caught.value) or "supported" in str(caught.value)


def test_a_panic_of_the_tokenizers_library_is_no_traceback(tmp_path: Path) -> None:
    files = byte_level_files(bos="<|endoftext|>")
    files["tokenizer.json"] = files["tokenizer.json"].replace(
        b'{"SpecialToken":{"id":"<|endoftext|>"', b'{"SpecialToken":{"id":"missing"'
    )
    encoder = encoder_of(files, tmp_path)
    with pytest.raises(CheckpointError, match="cannot encode the prompt"):
        encoder.encode("a")


def with_backend(files: dict[str, bytes], **parts: object) -> dict[str, bytes]:
    backend = json.loads(files["tokenizer.json"]) | parts
    return {**files, "tokenizer.json": json.dumps(backend).encode()}


def with_token(token: str, where: str) -> dict[str, bytes]:
    """Byte-level files that name this token in one of the places where tokens may stand."""
    files = byte_level_files()
    backend = json.loads(files["tokenizer.json"])
    added = {
        "content": token, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": False,
    }  # fmt: skip
    size = 5000
    if where == "vocabulary":
        return with_backend(
            files, model=backend["model"] | {"vocab": backend["model"]["vocab"] | {token: size}}
        )
    if where == "added token":
        return with_backend(files, added_tokens=[*backend["added_tokens"], added | {"id": size}])
    if where == "extra special tokens":
        return with_config(files, extra_special_tokens=[token])
    return with_config(files, pad_token=token)


PLACES = ["vocabulary", "added token", "extra special tokens", "settings"]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("token", ["Ġ" * 512, "Ġ" * 128])
def test_long_tokens_of_published_models_are_fine(token: str, where: str, tmp_path: Path) -> None:
    assert encoder_of(with_token(token, where), tmp_path).encode("a")


@pytest.mark.parametrize("where", PLACES)
def test_tokens_that_take_long_to_decode_are_refused(where: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has a token of 1026 bytes; at most 1024 are supp"):
        encoder_of(with_token("Ġ" * 513, where), tmp_path)


SPACES = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True},
        {
            "type": "Sequence",
            "decoders": [
                SPACES,
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    ],
)
def test_decoders_of_published_models_are_fine(decoder: object, tmp_path: Path) -> None:
    assert encoder_of(with_backend(sentencepiece_like(), decoder=decoder), tmp_path).encode("a")


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": []},
        {"type": "Sequence", "decoders": [SPACES | {"content": "x" * 10**5}, {"type": "Fuse"}]},
        {"type": "Sequence", "decoders": [SPACES | {"pattern": {"Regex": "(a+)+b"}}]},
        {"type": "Sequence", "decoders": [SPACES, SPACES]},
        {
            "type": "Sequence",
            "decoders": [
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 10**9, "stop": 0},
            ],
        },
    ],
)
def test_decoders_that_could_take_long_are_refused(decoder: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="another decoder than ByteLevel, Metaspace, or the"):
        encoder_of(with_backend(sentencepiece_like(), decoder=decoder), tmp_path)


def sentencepiece_like() -> dict[str, bytes]:
    """With a class that keeps the decoder of the file; LlamaTokenizer brings its own."""
    return with_config(sentencepiece_files(), tokenizer_class="PreTrainedTokenizerFast")


def test_no_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"The model comes without a tokenizer\.json"):
        encoder_of({"config.json": b'{"model_type": "qwen2"}'}, tmp_path)


@pytest.mark.parametrize("class_name", ["AutoModelForCausalLM", "pipeline", 3, "BertTokenizer"])
def test_only_tokenizer_classes_are_loaded(class_name: object, tmp_path: Path) -> None:
    files = with_config(byte_level_files(), tokenizer_class=class_name)
    with pytest.raises(CheckpointError, match="supported are GPT2Tokenizer, LlamaTokenizer"):
        encoder_of(files, tmp_path)


def test_settings_that_name_code_or_other_files_never_reach_transformers(tmp_path: Path) -> None:
    files = with_config(
        byte_level_files(),
        auto_map={"AutoTokenizer": ["evil--evil.Evil", None]},
        gguf_file="../../secret.gguf",
        tokenizer_file="/etc/passwd",
        vocab_file="/etc/passwd",
        name_or_path="evil/evil",
        init_inputs=[1],
        local_files_only=False,
    )
    files["config.json"] = b'{"model_type": "qwen2", "auto_map": {"AutoConfig": "evil.Evil"}}'
    assert encoder_of(files, tmp_path).encode("a")
    written = b"".join(path.read_bytes() for path in (tmp_path / FINGERPRINT).iterdir())
    for word in (b"evil", b"passwd", b"gguf", b"auto_map", b"init_inputs"):
        assert word not in written


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('only\\nfrogs\\x1b[2J') }}",
        "{{ 1 / 0 }}",
        "{% if %}",
    ],
)
def test_templates_that_fail_or_attack(template: str, tmp_path: Path) -> None:
    encoder = encoder_of(byte_level_files(template), tmp_path)
    with pytest.raises(CheckpointError, match="The chat template of the model fails") as caught:
        encoder.encode("a")
    assert str(caught.value).isprintable()
    assert encoder.encode("a", raw=True)


# --- the cache ----------------------------------------------------------------------------------


def test_cache_is_private_and_reused(tmp_path: Path) -> None:
    cache_dir = tmp_path / "deep" / "cache"
    files = byte_level_files()
    encoder_of(files, cache_dir)
    target = cache_dir / FINGERPRINT
    assert target.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in cache_dir.iterdir()] == [FINGERPRINT]
    before = target.stat().st_ino
    encoder_of(files, cache_dir)
    assert target.stat().st_ino == before


def test_cache_that_holds_something_else_is_replaced(tmp_path: Path) -> None:
    files = byte_level_files()
    encoder_of(files, tmp_path)
    target = tmp_path / FINGERPRINT
    (target / "tokenizer.json").write_bytes(b"{}")
    (target / "tokenization_evil.py").write_text("raise SystemExit")
    assert encoder_of(files, tmp_path).encode("a")
    assert {path.name for path in target.iterdir()} == set(files)
    assert [path.name for path in tmp_path.iterdir()] == [FINGERPRINT]


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"The tokenizer cache .* cannot be used .* name a direct"):
        encoder_of(byte_level_files(), tmp_path / "file")


def test_a_fingerprint_that_is_no_name_is_our_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="64 lower-case hex digits"):
        PromptEncoder(byte_level_files(), tmp_path, "../..")


def test_importing_the_module_does_not_import_transformers() -> None:
    code = (
        "import sys, otpipe.client.prompt, otpipe.client.sampling, otpipe.client.text_stream;"
        " sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
