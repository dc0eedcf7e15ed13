"""Small tokenizers of the kinds that supported models use, as the files of a checkpoint."""

from __future__ import annotations

import json
from importlib.resources import files as package_files

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

FINGERPRINT = "ab" * 32
TEXTS = [
    "In the beginning the server saw nothing, and the client said: let there be pads.",
    "Übergrößen, naïve café, Ελληνικά, русский, עברית, العربية.",
    "你好，世界。日本語のテキスト。한국어 문장.",  # noqa: RUF001
    "emoji: 😀 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽",
    "  leading, double  and trailing spaces  \n\tand\r\nlines ",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPM_WORDS = ["\u2581", "\u2581\u2581", "\u2581a", "\u2581the", "b", "the", "你", "a\u2581b", "<0x"]


def sample_files() -> dict[str, bytes]:
    """The tokenizer that comes with otpipe."""
    directory = package_files("otpipe") / "sample"
    names = ("tokenizer.json", "tokenizer_config.json")
    return {name: (directory / name).read_bytes() for name in names}


def byte_level_backend(bos: str | None = None) -> Tokenizer:
    """GPT-2 style, as Qwen 2 and Llama 3; with a text-like and a spaced added token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\s+|[^\s\p{L}]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(TEXTS, trainer)
    # Not special: printed. The second has a space, the third letters of the byte alphabet.
    backend.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "two words", "é½")])
    if bos is not None:
        bos_id = backend.token_to_id(bos)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bos_id)]
        )
    return backend


def byte_level_files(
    chat_template: str | None = None, bos: str | None = None, **settings: object
) -> dict[str, bytes]:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": bos,
        # As Llama 3 has it; it must not change the text.
        "clean_up_tokenization_spaces": True,
        "model_max_length": 16,
        **settings,
    }
    files = {
        "tokenizer.json": byte_level_backend(bos).to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    if chat_template is not None:
        files["chat_template.jinja"] = chat_template.encode()
    return files


def sentencepiece_backend(decoder: decoders.Decoder | None = None) -> Tokenizer:
    """Words with a space mark and a byte token for everything else, as Llama 1 and 2."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SPM_WORDS]
    vocab = {token: place for place, token in enumerate(tokens)}
    merges = [("\u2581", "\u2581"), ("\u2581", "a")]
    vocab |= {"a": len(vocab)}
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoder or decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def sentencepiece_files() -> dict[str, bytes]:
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    return {
        "tokenizer.json": sentencepiece_backend().to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "config.json": b'{"model_type": "llama", "eos_token_id": 2}',
    }
