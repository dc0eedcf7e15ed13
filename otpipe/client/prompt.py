"""Prompt text to token ids, with the tokenizer files that the server publishes.

The server is not trusted, and a tokenizer directory can ask transformers for a lot: to run code, to
open other files, to load any class. So only known file names are written, with only the settings
that describe a tokenizer, and only known tokenizer classes are loaded. A chat template is a
program, which transformers runs in jinja's immutable sandbox.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otpipe.client.text_stream import decodes_token_by_token
from otpipe.errors import CheckpointError, UsageError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VERBATIM_FILES = (
    "tokenizer.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# Besides these, transformers hands every setting to the constructor of the tokenizer, among them
# some that name files or repositories.
_TOKENIZER_SETTINGS = frozenset(
    {
        "add_bos_token",
        "add_eos_token",
        "add_prefix_space",
        "added_tokens_decoder",
        "additional_special_tokens",
        "bos_token",
        "chat_template",
        "cls_token",
        "eos_token",
        "extra_special_tokens",
        "legacy",
        "mask_token",
        "model_input_names",
        "model_max_length",
        "pad_token",
        "sep_token",
        "split_special_tokens",
        "tokenizer_class",
        "unk_token",
    }
)
# What transformers needs to choose the class of the tokenizer; the rest of it is for the model.
_CONFIG_SETTINGS = frozenset({"model_type", "tokenizer_class"})
_FILTERED_FILES = {
    "tokenizer_config.json": _TOKENIZER_SETTINGS,
    "special_tokens_map.json": _TOKENIZER_SETTINGS,
    "config.json": _CONFIG_SETTINGS,
}
# Read here or not at all, never written.
_OTHER_FILES = ("generation_config.json", "chat_template.json", "vocab.json", "merges.txt")
TOKENIZER_FILES = frozenset({*_VERBATIM_FILES, *_FILTERED_FILES, *_OTHER_FILES})

_TOKENIZER_CLASSES = (
    "GPT2Tokenizer",
    "LlamaTokenizer",
    "PreTrainedTokenizer",
    "Qwen2Tokenizer",
    "TokenizersBackend",
)
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_MODEL_TYPES = ("llama", "qwen2")
_REMEDY = "repair it in the checkpoint of the server"

MAX_TOKEN_BYTES = 1024
"""Longest token, in bytes of UTF-8; the longest of published models, runs of spaces, have 256 or a
few more. Text is decoded between two requests, so the time that a token of megabytes takes would
show the server that it was generated."""


class PromptEncoder:
    """The tokenizer of one model.

    files: name -> content, names from :data:`TOKENIZER_FILES`, as in ``ModelBundle.files``.
    cache_dir: where the files are unpacked for transformers, in a directory of mode 0700 named by
        the fingerprint; created where missing, and replaced where its content is another.
    fingerprint: of the model, 64 hexadecimal digits.
    vocab_size: ids from here on are refused, because the model has no such token.

    Loading takes seconds, because it imports transformers. Raises CheckpointError for files that
    do not make a tokenizer, UsageError for a cache directory that cannot be written.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        cache_dir: Path,
        fingerprint: str,
        vocab_size: int | None = None,
    ) -> None:
        if not _FINGERPRINT.fullmatch(fingerprint):  # it becomes the name of a directory
            raise ValueError(f"fingerprint {fingerprint!r:.80} is not 64 lower-case hex digits")
        unknown = sorted(set(files) - TOKENIZER_FILES)
        if unknown:
            raise CheckpointError(
                f"The model comes with a file {unknown[0]!r:.80}, which is no known tokenizer"
                f" file; use {', '.join(sorted(TOKENIZER_FILES))}."
            )
        if "tokenizer.json" not in files:  # transformers would make one without vocabulary
            raise CheckpointError(
                "The model comes without a tokenizer.json; save one into the checkpoint of the"
                " server with save_pretrained of its tokenizer."
            )
        self._settings = {
            name: _json_object(name, content)
            for name, content in files.items()
            if name in _FILTERED_FILES or name == "generation_config.json"
        }
        self._vocab_size = vocab_size
        self.tokenizer: PreTrainedTokenizerFast = _load(
            _unpack(_safe_files(files, self._settings), cache_dir, fingerprint)
        )
        _refuse_slow_decoding(self.tokenizer)

    @property
    def has_chat_template(self) -> bool:
        """Whether :meth:`encode` without ``raw`` makes the prompt a turn of a conversation."""
        return bool(self.tokenizer.chat_template)

    def encode(
        self, prompt: str, raw: bool = False, history: Sequence[tuple[str, str]] = ()
    ) -> list[int]:
        """Token ids of the prompt, at least one.

        With a chat template the prompt becomes the user's turn, after the turns of ``history``
        (role and text of each), and the assistant's is opened.
        Without one, or if ``raw``, it is encoded as it is, with the tokenizer's usual special
        tokens (such as a beginning-of-text token). An empty prompt is fine where this leaves any
        token. Raises UsageError for a prompt that cannot be used.
        """
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"The prompt is not valid Unicode (U+{ord(prompt[error.start]):04X} at position"
                f" {error.start}); give UTF-8 text."
            ) from None
        if self.has_chat_template and not raw:
            with _checkpoint_error("The chat template of the model fails"):
                token_ids = self._apply_chat_template([*history, ("user", prompt)])
        else:
            with _checkpoint_error("The tokenizer of the model cannot encode the prompt"):
                # verbose: the caller checks the length by the model, not the tokenizer's guess.
                token_ids = self.tokenizer(prompt, verbose=False)["input_ids"]
        if not token_ids:
            raise UsageError(
                "The prompt is empty and this model has no beginning-of-text token to start from;"
                " give a prompt of at least one character."
            )
        if self._vocab_size is not None and max(token_ids) >= self._vocab_size:
            raise CheckpointError(
                f"The tokenizer of the model gives token {max(token_ids)}, but the model has only"
                f" {self._vocab_size} tokens; {_REMEDY}."
            )
        return list(token_ids)

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        """Ids that end a text: all that generation_config, config and the tokenizer name."""
        found: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            value = self._settings.get(name, {}).get("eos_token_id")
            values = value if isinstance(value, list) else [] if value is None else [value]
            for token_id in values:
                if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
                    raise CheckpointError(
                        f"{name} of the model has eos_token_id {value!r:.60}, which must be token"
                        f" ids; {_REMEDY}."
                    )
                found.add(token_id)
        if self.tokenizer.eos_token_id is not None:
            found.add(self.tokenizer.eos_token_id)
        return frozenset(found)

    def _apply_chat_template(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        token_ids: Any = self.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            add_generation_prompt=True,
            return_dict=False,
            tokenizer_kwargs={"verbose": False},
        )
        return list(token_ids)


# --- reading the files ------------------------------------------------------------------------


def _json_object(name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{name} of the model is no JSON ({one_line(error)}); {_REMEDY}."
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} of the model is no JSON object; {_REMEDY}.")
    return value


def _safe_files(
    files: Mapping[str, bytes], settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, bytes]:
    """The files that transformers gets to see, with only the settings that it needs."""
    safe = {name: files[name] for name in _VERBATIM_FILES if name in files}
    for name, allowed in _FILTERED_FILES.items():
        if name not in files:
            continue
        kept = {key: value for key, value in settings[name].items() if key in allowed}
        class_name = kept.get("tokenizer_class")
        if class_name is not None and (
            not isinstance(class_name, str)
            or class_name.removesuffix("Fast") not in _TOKENIZER_CLASSES
        ):
            raise CheckpointError(
                f"{name} of the model has tokenizer_class {class_name!r:.60}; supported are"
                f" {', '.join(_TOKENIZER_CLASSES)} and their Fast forms."
            )
        if name == "config.json" and kept.get("model_type") not in _MODEL_TYPES:
            raise CheckpointError(
                f"config.json of the model has model_type {kept.get('model_type')!r:.60}; supported"
                f" are {', '.join(_MODEL_TYPES)}."
            )
        safe[name] = json.dumps(kept, sort_keys=True).encode()
    return safe


def _unpack(files: Mapping[str, bytes], cache_dir: Path, fingerprint: str) -> Path:
    """The directory in ``cache_dir`` that holds exactly these files, made in one step."""
    target = cache_dir / fingerprint
    try:
        if _holds(target, files):
            return target
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        # mkdtemp makes it 0700. Another process may do the same at the same time: both write the
        # same content, and a rename onto a directory that is not empty fails.
        staging = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=cache_dir))
        try:
            new = staging / "new"
            new.mkdir(mode=0o700)
            for name, content in files.items():
                (new / name).write_bytes(content)
            if target.exists() and not _holds(target, files):
                target.rename(staging / "damaged")
            try:
                new.rename(target)
            except OSError:
                if not _holds(target, files):
                    raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise UsageError(
            f"The tokenizer cache {cache_dir} cannot be used ({one_line(error)}); name a directory"
            " that you can write."
        ) from error
    return target


def _holds(directory: Path, files: Mapping[str, bytes]) -> bool:
    return (
        directory.is_dir()
        and {entry.name for entry in directory.iterdir()} == set(files)
        and all((directory / name).read_bytes() == content for name, content in files.items())
    )


def _load(directory: Path) -> Any:
    from transformers import AutoTokenizer  # takes seconds, so only here

    with _checkpoint_error("The tokenizer of the model cannot be loaded"), _quiet_transformers():
        return AutoTokenizer.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,  # without it, transformers asks on the terminal
            # Made for WordPiece; transformers ignores it for BPE, but not in every version.
            clean_up_tokenization_spaces=False,
        )


def _refuse_slow_decoding(tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse what could make the time to decode a token tell which token it is.

    Looks at the tokenizer as loaded: tokens and the decoder come from more than one file.
    """
    backend = tokenizer.backend_tokenizer
    with _checkpoint_error("The tokenizer of the model cannot be loaded"):
        longest = max(
            (len(token.encode()) for token in backend.get_vocab(with_added_tokens=True)), default=0
        )
        streams = decodes_token_by_token(backend.decoder)
    if longest > MAX_TOKEN_BYTES:
        raise CheckpointError(
            f"The tokenizer of the model has a token of {longest} bytes; at most {MAX_TOKEN_BYTES}"
            f" are supported, {_REMEDY}."
        )
    if not streams:
        raise CheckpointError(
            "The tokenizer of the model has another decoder than ByteLevel, Metaspace, or the"
            f" Replace, ByteFallback, Fuse, Strip of a Llama tokenizer; {_REMEDY}."
        )


@contextlib.contextmanager
def _checkpoint_error(what: str) -> Iterator[None]:
    """Turns whatever the model's files provoke into a CheckpointError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # also tokenizers' PanicException, which is no Exception
        raise CheckpointError(f"{what} ({one_line(error)}); {_REMEDY}.") from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Advice on how to rewrite a checkpoint is not for the user of a server."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
