"""Build the bundled sample model: corpus, tokenizer, weights.

The sample model is a small Qwen2-architecture language model trained from
scratch on the King James Bible, a public-domain text that Debian carries in
the packages ``bible-kjv-text`` (data) and ``bible-kjv`` (reader program).

Three steps, each a subcommand::

    python launch/train_sample_model.py corpus --out .train
    python launch/train_sample_model.py tokenizer --data .train --out .train/tokenizer
    python launch/train_sample_model.py train --data .train \
        --tokenizer .train/tokenizer --out .train/model

Only ``corpus`` needs a Debian machine with network access (or the two ``.deb``
files, given with ``--deb``). ``train`` needs neither, so it can run on an
isolated GPU machine once the first two steps have been done elsewhere.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
PACKAGES = ("bible-kjv", "bible-kjv-text")

# The pre-tokenizer pattern of the Qwen2 tokenizer.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

BOOK_NAMES = (
    "Genesis,Exodus,Leviticus,Numbers,Deuteronomy,Joshua,Judges,Ruth,1 Samuel,"
    "2 Samuel,1 Kings,2 Kings,1 Chronicles,2 Chronicles,Ezra,Nehemiah,Esther,Job,"
    "Psalm,Proverbs,Ecclesiastes,Song of Solomon,Isaiah,Jeremiah,Lamentations,"
    "Ezekiel,Daniel,Hosea,Joel,Amos,Obadiah,Jonah,Micah,Nahum,Habakkuk,Zephaniah,"
    "Haggai,Zechariah,Malachi,Matthew,Mark,Luke,John,Acts,Romans,1 Corinthians,"
    "2 Corinthians,Galatians,Ephesians,Philippians,Colossians,1 Thessalonians,"
    "2 Thessalonians,1 Timothy,2 Timothy,Titus,Philemon,Hebrews,James,1 Peter,"
    "2 Peter,1 John,2 John,3 John,Jude,Revelation"
)
BOOKS = tuple(BOOK_NAMES.split(","))
HELD_OUT_BOOKS = ("Ruth", "Jonah", "Philippians", "James")

VERSE_LINE = re.compile(r"^([1-3]?[A-Za-z]+)(\d+):(\d+) (.+)$")
PARAGRAPH_CHARS = 500
SAMPLE_PROMPTS = (
    "In the beginning God created",
    "And it came to pass in those days, that",
    "Blessed is the man that",
)


# --- corpus -----------------------------------------------------------------


def dump_bible(debs: tuple[Path, ...]) -> str:
    """Return the whole text, one ``Abbr<chapter>:<verse> text`` line per verse.

    The data file of the package is compressed in a format of its own, so the
    text is read through the package's reader program, unpacked into a
    temporary folder; nothing is installed.
    """
    with tempfile.TemporaryDirectory(prefix="kjv-") as folder:
        work = Path(folder)
        if not debs:
            subprocess.run(["apt-get", "download", *PACKAGES], cwd=work, check=True)
            debs = tuple(sorted(work.glob("*.deb")))
        for deb in debs:
            subprocess.run(["dpkg-deb", "-x", str(deb), str(work / "x")], check=True)
        dumped = subprocess.run(
            [str(work / "x/usr/bin/bible"), "-f", "-p", "./", "Gen1:1-Rev22:21"],
            cwd=work / "x/usr/lib",
            check=True,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
    return dumped.stdout


def iter_chapters(dump: str) -> Iterator[tuple[str, int, list[str]]]:
    """Yield (book, chapter number, verses) in the order of the dump."""
    book_index = -1
    abbreviation = ""
    chapter = 0
    verses: list[str] = []
    for line in dump.splitlines():
        match = VERSE_LINE.match(line)
        if match is None:
            raise click.ClickException(f"unexpected line in the dump: {line!r}")
        abbr, number, text = match[1], int(match[2]), match[4].strip()
        if (abbr, number) != (abbreviation, chapter):
            if verses:
                yield BOOKS[book_index], chapter, verses
            book_index += abbr != abbreviation
            abbreviation, chapter, verses = abbr, number, []
        verses.append(text)
    if book_index != len(BOOKS) - 1:
        raise click.ClickException(f"{book_index + 1} books found, not {len(BOOKS)}")
    yield BOOKS[book_index], chapter, verses


def format_chapter(book: str, chapter: int, verses: list[str]) -> str:
    """Set a chapter as prose: a heading, then paragraphs without verse numbers."""
    paragraphs: list[str] = []
    current = ""
    for verse in verses:
        current = f"{current} {verse}" if current else verse
        if len(current) >= PARAGRAPH_CHARS and current[-1] in ".?!":
            paragraphs.append(current)
            current = ""
    if current:
        paragraphs.append(current)
    return f"{book} {chapter}\n\n" + "\n\n".join(paragraphs) + "\n"


# --- tokenizer --------------------------------------------------------------


def build_tokenizer(train_text: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer; any text survives a round trip."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(train_text.split(END_OF_TEXT), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer under the class name that every release can load.

    Transformers 5 writes the name ``TokenizersBackend``, unknown to version 4;
    it reads ``PreTrainedTokenizerFast`` as the same class.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("is_local", "local_files_only"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# --- training ---------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How long to train, and with how much dropout."""

    epochs: float
    dropout: float

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read ``EPOCHS:DROPOUT``, for example ``40:0.15``."""
        try:
            epochs, dropout = (float(part) for part in text.split(":"))
        except ValueError as error:
            raise click.BadParameter(f"{text!r} is not EPOCHS:DROPOUT") from error
        if epochs <= 0 or not 0 <= dropout < 1:
            raise click.BadParameter(f"{text!r}: EPOCHS > 0 and 0 <= DROPOUT < 1")
        return cls(epochs, dropout)


@dataclass(frozen=True)
class Settings:
    """What all recipes of one run share."""

    device: torch.device
    context: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    evals: int
    seed: int


@dataclass
class Best:
    """The best weights seen so far, held in CPU memory."""

    loss: float = math.inf
    step: int = 0
    epoch: float = 0.0
    recipe: Recipe | None = None
    weights: dict[str, torch.Tensor] | None = None


def new_model(vocab_size: int, max_positions: int, attention_dropout: float) -> Any:
    """Create the untrained model."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        attention_dropout=attention_dropout,
        eos_token_id=0,
        # pad_token_id stays unset: as the padding index of the embedding it
        # would cut the end-of-text token off from its gradient.
    )
    return Qwen2ForCausalLM(config)


def add_dropout(model: Qwen2ForCausalLM, rate: float) -> None:
    """Put dropout on the embedding and on each residual branch, while training.

    The Qwen2 architecture itself only has dropout on attention weights; hooks
    leave the saved model a plain Qwen2 model.
    """
    import torch

    def hook(module: torch.nn.Module, _args: Any, output: Any) -> Any:
        if not module.training:
            return output
        if isinstance(output, tuple):
            first = torch.nn.functional.dropout(output[0], rate)
            return (first, *output[1:])
        return torch.nn.functional.dropout(output, rate)

    model.model.embed_tokens.register_forward_hook(hook)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(hook)
        layer.mlp.register_forward_hook(hook)


def token_losses(
    model: Qwen2ForCausalLM, windows: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """Cross-entropy of each window's tokens after its first one."""
    import torch

    cuda = windows.device.type == "cuda"
    with torch.autocast(windows.device.type, dtype=torch.bfloat16, enabled=cuda):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction=reduction
    )


def held_out_loss(
    model: Qwen2ForCausalLM, tokens: torch.Tensor, context: int, batch_size: int
) -> float:
    """Mean loss per token over consecutive windows of ``context`` tokens."""
    import torch

    was_training = model.training
    model.eval()
    whole = (len(tokens) - 1) // context
    windows = [tokens[i * context : (i + 1) * context + 1] for i in range(whole)]
    batches = [torch.stack(windows[i : i + batch_size]) for i in range(0, whole, batch_size)]
    rest = tokens[whole * context :]
    if len(rest) > 1:
        batches.append(rest[None])
    with torch.inference_mode():
        total = sum(float(token_losses(model, part, "sum")) for part in batches)
    model.train(was_training)
    return total / (len(tokens) - 1)


def iter_batches(tokens: torch.Tensor, context: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield random windows without end; each epoch cuts the text elsewhere."""
    import torch

    steps = torch.arange(context + 1, device=tokens.device)
    while True:
        shift = int(torch.randint(context, (1,)))
        starts = torch.arange(shift, len(tokens) - context, context)
        starts = starts[torch.randperm(len(starts))].to(tokens.device)
        for part in starts.split(batch_size):
            yield tokens[part[:, None] + steps]


def learning_rate_scale(progress: float, step: int, warmup_steps: int) -> float:
    """Linear warm-up, then a cosine from 1 to 0.02 as progress goes to 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, (step + 1) / warmup_steps) * (0.02 + 0.98 * cosine)


def train_once(
    *,
    recipe: Recipe,
    settings: Settings,
    train_tokens: torch.Tensor,
    heldout_tokens: torch.Tensor,
    vocab_size: int,
    max_positions: int,
    seconds: float,
    best: Best,
) -> float:
    """Train one model by ``recipe``; note in ``best`` what beats it.

    The schedule follows whichever is further on, the steps or the time spent,
    so that the learning rate has come down when either runs out. Training
    stops early once the held-out loss has risen well clear of its minimum.
    Returns the lowest held-out loss.
    """
    import torch

    torch.manual_seed(settings.seed)
    model = new_model(vocab_size, max_positions, attention_dropout=recipe.dropout / 2)
    add_dropout(model, recipe.dropout)
    model.to(settings.device).train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        fused=settings.device.type == "cuda",
    )
    tokens_per_step = settings.batch_size * settings.context
    total_steps = max(1, round(recipe.epochs * len(train_tokens) / tokens_per_step))
    batches = iter_batches(train_tokens, settings.context, settings.batch_size)
    click.echo(
        f"recipe: {recipe.epochs:g} epochs, dropout {recipe.dropout:g}: at most"
        f" {total_steps} steps of {tokens_per_step} tokens, {seconds:.0f} s"
    )

    lowest = math.inf
    started = time.monotonic()
    running = torch.zeros((), device=settings.device)
    seen = 0
    next_eval = 1 / settings.evals
    for step in range(total_steps):
        elapsed = time.monotonic() - started
        progress = max(step / total_steps, elapsed / seconds)
        scale = learning_rate_scale(progress, step, settings.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * scale
        loss = token_losses(model, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.detach()
        seen += 1

        last = step + 1 == total_steps or progress >= 1
        if not last and progress < next_eval:
            continue
        while next_eval <= progress:
            next_eval += 1 / settings.evals
        heldout = held_out_loss(model, heldout_tokens, settings.context, settings.batch_size)
        epoch = (step + 1) * tokens_per_step / len(train_tokens)
        click.echo(
            f"  step {step + 1:5d}  epoch {epoch:6.2f}  lr {scale:.2f}x"
            f"  train {float(running) / seen:.4f}  heldout {heldout:.4f}"
            f"  ppl {math.exp(heldout):.2f}  {time.monotonic() - started:.0f} s"
        )
        running.zero_()
        seen = 0
        lowest = min(lowest, heldout)
        if heldout < best.loss:
            best.loss, best.step, best.epoch = heldout, step + 1, epoch
            best.recipe = recipe
            best.weights = {
                name: value.detach().to("cpu", copy=True)
                for name, value in model.state_dict().items()
            }
        if heldout > lowest + 0.15:
            click.echo("  stopped early: the held-out loss is rising")
            break
        if last:
            break
    return lowest


def model_card(facts: dict[str, Any], samples: list[str]) -> str:
    """Write the model card from what the run measured."""
    shown = "\n\n".join(f"> {text}" for text in samples)
    return f"""---
license: cc0-1.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# Sample model: a small Qwen2 trained on the King James Bible

A causal language model of the Qwen2 architecture with {facts["parameters"]:,}
parameters ({facts["dtype"]}), trained from scratch, with a byte-level BPE tokenizer of
{facts["vocab_size"]} tokens. It exists so that the pipeline can be tried out and
tested with real weights, without a download. It continues text in the
manner of its one source; it knows nothing else, follows no instructions and
has no chat template.

## Data

The King James Version of the Bible (1611), as carried by the Debian package
`bible-kjv-text` and read out with the program of the package `bible-kjv`. The
package's copyright file states that the copyright of the text has expired. (In
the United Kingdom printing the text is subject to letters patent.)
Verse numbers are left out, and each chapter is one document: a heading such as
`Genesis 1`, a blank line, paragraphs, and `{END_OF_TEXT}`.

Held out of both tokenizer and weights: the books {", ".join(HELD_OUT_BOOKS)}.

| part | documents | tokens |
| --- | --- | --- |
| train | {facts["train_documents"]:,} | {facts["train_tokens"]:,} |
| held out | {facts["heldout_documents"]:,} | {facts["heldout_tokens"]:,} |

## Training

AdamW (learning rate {facts["learning_rate"]:g}, weight decay
{facts["weight_decay"]:g}, cosine schedule), {facts["batch_size"]} windows of
{facts["context"]} tokens a step, {facts["epochs"]:.1f} epochs, dropout
{facts["dropout"]:g} on the embedding and residual branches and half of that on
attention weights, on {facts["device"]}. Made with
`launch/train_sample_model.py`.

## Held-out perplexity

{facts["perplexity"]:.2f} per token ({facts["bits_per_byte"]:.3f} bits per byte), \
measured with the saved {facts["dtype"]}
weights in consecutive windows of {facts["context"]} tokens, the first of each window
without any context. The same text also chose which checkpoint
to keep, so the figure is slightly flattering.

## Samples

Greedy with a repetition penalty of 1.15, 60 tokens, not selected:

{shown}

## Licence

The text is in the public domain. The weights and the tokenizer are dedicated to
the public domain as well (CC0 1.0).
"""


# --- command line -----------------------------------------------------------


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Build the bundled sample model."""


@main.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".train"),
    help="Folder for train.txt and heldout.txt.",
)
@click.option(
    "--deb",
    "debs",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="The two packages, already downloaded (give it twice); "
    "without it they are fetched with apt-get.",
)
def corpus(out: Path, debs: tuple[Path, ...]) -> None:
    """Write train.txt and heldout.txt from the Debian packages."""
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    absolute = tuple(deb.resolve() for deb in debs)
    for book, chapter, verses in iter_chapters(dump_bible(absolute)):
        part = "heldout" if book in HELD_OUT_BOOKS else "train"
        parts[part].append(format_chapter(book, chapter, verses) + END_OF_TEXT)
    out.mkdir(parents=True, exist_ok=True)
    for name, documents in parts.items():
        text = "".join(documents)
        (out / f"{name}.txt").write_text(text, encoding="utf-8")
        click.echo(f"{name}.txt: {len(documents)} documents, {len(text):,} characters")


@main.command()
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(".train"),
    help="Folder with train.txt.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".train/tokenizer"),
    help="Folder for the tokenizer.",
)
@click.option("--vocab-size", type=click.IntRange(300), default=4096)
def tokenizer(data: Path, out: Path, vocab_size: int) -> None:
    """Train the byte-level BPE tokenizer on train.txt."""
    text = (data / "train.txt").read_text(encoding="utf-8")
    built = build_tokenizer(text, vocab_size)
    probe = "In the beginning — naïve e\u0301, 太初有道, \U0001f54a\ufe0f\r\n\t  \x00 end "
    if built.decode(built.encode(probe), skip_special_tokens=False) != probe:
        raise click.ClickException("the tokenizer does not round-trip")
    out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(built, out)
    tokens = len(built.encode(text, add_special_tokens=False, verbose=False))
    click.echo(
        f"{len(built)} tokens in the vocabulary; train.txt is {tokens:,} tokens,"
        f" {len(text.encode()) / tokens:.2f} bytes each"
    )


@main.command()
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(".train"),
    help="Folder with train.txt and heldout.txt.",
)
@click.option(
    "--tokenizer",
    "tokenizer_path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(".train/tokenizer"),
    help="Folder with the tokenizer.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".train/model"),
    help="Folder for the trained model.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    default=4.0,
    help="Time budget for all recipes together.",
)
@click.option(
    "--recipe",
    "recipe_texts",
    multiple=True,
    default=("40:0.15",),
    metavar="EPOCHS:DROPOUT",
    help="May be given several times; the best result is kept.",
)
@click.option("--context", type=click.IntRange(2), default=512)
@click.option("--max-positions", type=click.IntRange(2), default=1024)
@click.option("--batch-size", type=click.IntRange(1), default=32)
@click.option("--learning-rate", type=float, default=1.5e-3)
@click.option("--weight-decay", type=float, default=0.1)
@click.option("--warmup-steps", type=click.IntRange(1), default=100)
@click.option("--evals", type=click.IntRange(1), default=25, help="Evaluations per recipe.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16")
@click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads; 0: as many.")
@click.option("--seed", type=int, default=0)
def train(
    *,
    data: Path,
    tokenizer_path: Path,
    out: Path,
    device: str,
    minutes: float,
    recipe_texts: tuple[str, ...],
    context: int,
    max_positions: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
    evals: int,
    dtype: str,
    threads: int,
    seed: int,
) -> None:
    """Train the model, and save it with its tokenizer and model card."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Qwen2ForCausalLM

    recipes = [Recipe.parse(text) for text in recipe_texts]
    if context > max_positions:
        raise click.BadParameter("--context is larger than --max-positions")
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    target = torch.device(device)
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True

    coder = AutoTokenizer.from_pretrained(tokenizer_path)
    texts = {
        name: (data / f"{name}.txt").read_text(encoding="utf-8") for name in ("train", "heldout")
    }
    ids = {
        name: torch.tensor(
            coder.encode(text, add_special_tokens=False, verbose=False), device=target
        )
        for name, text in texts.items()
    }
    for name, tokens in ids.items():
        click.echo(f"{name}: {len(tokens):,} tokens")
    settings = Settings(
        target,
        context,
        batch_size,
        learning_rate,
        weight_decay,
        warmup_steps,
        evals,
        seed,
    )

    best = Best()
    deadline = time.monotonic() + 60 * minutes
    for index, recipe in enumerate(recipes):
        left = sum(other.epochs for other in recipes[index:])
        seconds = (deadline - time.monotonic()) * recipe.epochs / left
        lowest = train_once(
            recipe=recipe,
            settings=settings,
            train_tokens=ids["train"],
            heldout_tokens=ids["heldout"],
            vocab_size=len(coder),
            max_positions=max_positions,
            seconds=max(1.0, seconds),
            best=best,
        )
        click.echo(f"  lowest held-out loss {lowest:.4f}")
    if best.weights is None or best.recipe is None:
        raise click.ClickException("no usable checkpoint: the loss was never finite")

    model = new_model(len(coder), max_positions, attention_dropout=0.0)
    model.load_state_dict(best.weights)
    model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    save_tokenizer(coder, out)

    # Measure and sample what was saved, not what was in memory.
    saved_coder = AutoTokenizer.from_pretrained(out)
    saved = Qwen2ForCausalLM.from_pretrained(out, dtype=getattr(torch, dtype))
    saved.to(target).eval()
    loss = held_out_loss(saved, ids["heldout"], context, batch_size)
    samples = []
    for prompt in SAMPLE_PROMPTS:
        inputs = saved_coder(prompt, return_tensors="pt").to(target)
        made = saved.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=60,
            do_sample=False,
            repetition_penalty=1.15,
        )
        text = saved_coder.decode(made[0], skip_special_tokens=True)
        samples.append(" ".join(text.split()))
    heldout_bytes = len(texts["heldout"].replace(END_OF_TEXT, "").encode())
    facts = {
        "parameters": saved.num_parameters(),
        "dtype": dtype,
        "vocab_size": len(coder),
        "train_documents": texts["train"].count(END_OF_TEXT),
        "heldout_documents": texts["heldout"].count(END_OF_TEXT),
        "train_tokens": len(ids["train"]),
        "heldout_tokens": len(ids["heldout"]),
        "context": context,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "epochs": best.epoch,
        "dropout": best.recipe.dropout,
        "device": torch.cuda.get_device_name() if device == "cuda" else "a CPU",
        "perplexity": math.exp(loss),
        "bits_per_byte": loss * (len(ids["heldout"]) - 1) / (heldout_bytes * math.log(2)),
    }
    (out / "README.md").write_text(model_card(facts, samples), encoding="utf-8")
    click.echo(json.dumps(facts, indent=2))
    click.echo("\n\n".join(samples))
    for path in sorted(out.iterdir()):
        click.echo(f"{path.stat().st_size:>12,}  {path}")


if __name__ == "__main__":
    main()
