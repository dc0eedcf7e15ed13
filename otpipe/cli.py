"""``otpipe prepare|generate|chat|info|slots``: the client on the command line."""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from otpipe import __version__
from otpipe.errors import ConnectionLost, OtpipeError, UsageError

if TYPE_CHECKING:
    from rich.progress import Progress as ProgressBar

    from otpipe.client.client import Client
    from otpipe.client.generation import Generation

EXIT_USAGE = 2
EXIT_FAILURE = 1

# C0 without tab and line feed, DEL, and C1.
_TERMINAL_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {0x09, 0x0A})


@click.group(context_settings={"show_default": True})
@click.version_option(__version__, prog_name="otpipe")
def main() -> None:
    """Private LLM inference: the server learns nothing about the prompt or the answer."""
    logging.basicConfig(
        level=logging.WARNING, format="otpipe: %(message)s", stream=sys.stderr, force=True
    )


@dataclass(frozen=True)
class Connection:
    """The options of every command that talks to a server."""

    server: str
    store: Path | None
    ca: str | None
    fingerprint: str | None
    retry_for_s: float

    def open(self) -> Client:
        """Connect, and lock the store."""
        from otpipe.client.client import Client

        return Client(
            self.server,
            self.store,
            ca=self.ca,
            fingerprint=self.fingerprint,
            retry_for_s=self.retry_for_s,
            on_prepare=_PrepareBar(),
        )


def connection_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of :class:`Connection`; the command gets them as ``connection``."""

    @click.option(
        "--server",
        required=True,
        envvar="OTPIPE_SERVER",
        help="HOST:PORT, or several replicas separated by commas.",
    )
    @store_option
    @click.option("--ca", help="PEM file of the server's authority, or 'system'; turns TLS on.")
    @click.option("--fingerprint", help="Accept only these weights: 32 hex digits or more.")
    @click.option(
        "--retry-for",
        "retry_for_s",
        type=click.FloatRange(min=0),
        default=30.0,
        help="Seconds to look for a lost server.",
    )
    @functools.wraps(command)
    def wrapped(
        server: str,
        store: Path | None,
        ca: str | None,
        fingerprint: str | None,
        retry_for_s: float,
        **others: Any,
    ) -> None:
        command(Connection(server, store, ca, fingerprint, retry_for_s), **others)

    return wrapped


def store_option(command: Callable[..., None]) -> Callable[..., None]:
    """Where pads are kept."""
    return click.option(
        "--store",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="OTPIPE_STORE",
        help="Directory of the pads [default: the user's data directory].",
    )(command)


def ends_cleanly(command: Callable[..., None]) -> Callable[..., None]:
    """Print an expected error as one sentence and exit non-zero."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except OtpipeError as error:
            click.echo(f"otpipe: {error}", err=True)
            sys.exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILURE)
        except KeyboardInterrupt:
            click.echo("otpipe: interrupted; slots drawn so far are spent", err=True)
            sys.exit(130)
        except BrokenPipeError:
            sys.exit(EXIT_FAILURE)

    return wrapped


class _PrepareBar:
    """A progress bar on stderr that appears with the first byte and disappears at the end."""

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = self._start(total)
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        if done >= total:
            self.stop()

    @staticmethod
    def _start(total: int) -> ProgressBar:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        bar = Progress(
            TextColumn("preparing"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        bar.add_task("prepare", total=total)
        bar.start()
        return bar

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@main.command()
@connection_options
@click.option("--slots", type=click.IntRange(min=1), default=2048, help="Token positions.")
@ends_cleanly
def prepare(connection: Connection, slots: int) -> None:
    """Prepare pads ahead of time; needs no prompt."""
    with connection.open() as client:
        report = client.prepare(slots)
        click.echo(
            f"prepared {report.slots} slots in {report.seconds:.1f} s "
            f"({report.slots / report.seconds:.1f} slots/s, {report.bytes_sent / 1e6:.1f} MB up, "
            f"{report.bytes_received / 1e6:.1f} MB down); {client.free_slots} are free"
        )


@main.command()
@connection_options
@click.option("--prompt", help="The prompt itself.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="UTF-8 file; - is stdin.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256)
@click.option("--temperature", type=float, default=0.0, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0)
@click.option("--top-k", type=int, default=0, help="0 switches it off.")
@click.option("--seed", type=int, help="Repeatable sampling; no secret.")
@click.option("--raw", is_flag=True, help="No chat template.")
@click.option(
    "--hide-length",
    is_flag=True,
    help="Go on to --max-new-tokens after the answer's end: the server does not learn its length.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
@ends_cleanly
def generate(
    connection: Connection,
    prompt: str | None,
    prompt_file: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    raw: bool,
    hide_length: bool,
    as_json: bool,
) -> None:
    """Generate text privately; prepares slots by itself when they run out."""
    text = _read_prompt(prompt, prompt_file)
    with connection.open() as client:
        try:
            for piece in client.generate(
                text,
                max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                raw=raw,
                hide_length=hide_length,
            ):
                if not as_json:
                    click.echo(_for_terminal(piece) if sys.stdout.isatty() else piece, nl=False)
        except ConnectionLost:
            _finish(client.last, as_json)  # the text so far is the user's; then say why it ended
            raise
        _finish(client.last, as_json)


@main.command()
@connection_options
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, help="Of an answer.")
@click.option("--temperature", type=float, default=0.0, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0)
@click.option("--top-k", type=int, default=0, help="0 switches it off.")
@ends_cleanly
def chat(
    connection: Connection, max_new_tokens: int, temperature: float, top_p: float, top_k: int
) -> None:
    """Talk with the model: a line is a turn, the end of the input ends it."""
    from otpipe.client.chat import Chat
    from otpipe.client.sampling import SamplingParams

    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=None)
    with connection.open() as client:
        conversation = Chat(client, max_new_tokens, params)
        while True:
            click.echo("> ", nl=False, err=True)
            line = sys.stdin.readline()
            if not line.strip():
                click.echo(err=True)
                return
            for piece in conversation.say(line.rstrip("\n")):
                click.echo(_for_terminal(piece) if sys.stdout.isatty() else piece, nl=False)
            click.echo()


def _for_terminal(text: str) -> str:
    """Without control characters: the model, which the server chose, could steer the terminal."""
    return text.translate(_TERMINAL_CONTROLS)


def _finish(generation: Generation | None, as_json: bool) -> None:
    if generation is None:
        return
    if as_json:
        click.echo(json.dumps(generation.to_dict(), ensure_ascii=False))
        return
    stats = generation.stats
    click.echo()
    click.echo(
        f"otpipe: {stats.tokens_per_s:.1f} tokens/s, {stats.bytes_sent / 1e6:.2f} MB up, "
        f"{stats.bytes_received / 1e6:.2f} MB down, {stats.round_trips} round trips, "
        f"{stats.slots_used} slots used",
        err=True,
    )
    for name, cost in generation.operations.items():
        click.echo(
            f"otpipe: {name}: {cost['seconds']:.1f} s, {cost['bytes_sent'] / 1e6:.2f} MB up, "
            f"{cost['bytes_received'] / 1e6:.2f} MB down, {cost['rounds']:.0f} rounds",
            err=True,
        )


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise UsageError("give either --prompt TEXT or --prompt-file FILE")
    if prompt is not None:
        return prompt
    assert prompt_file is not None
    try:
        if str(prompt_file) == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        return prompt_file.read_text("utf-8")
    except OSError as error:
        raise UsageError(f"--prompt-file {prompt_file}: {error.strerror}; give a file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt-file {prompt_file} is not UTF-8: {error}") from error


@main.command()
@connection_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@ends_cleanly
def info(connection: Connection, as_json: bool) -> None:
    """Show the server's model, its cost a token, and this client's slots."""
    with connection.open() as client:
        facts = client.info()
    if as_json:
        click.echo(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {value}")


@main.command()
@store_option
@click.option("--server", envvar="OTPIPE_SERVER", help="Only the slots for this server's model.")
@click.option("--ca", help="PEM file of the server's authority, or 'system'; turns TLS on.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list, an object a batch.")
@ends_cleanly
def slots(store: Path | None, server: str | None, ca: str | None, as_json: bool) -> None:
    """List the prepared slots on this machine; works beside a client that is drawing."""
    from otpipe.client.link import LinkOptions, ServerAddress, ServerLink
    from otpipe.client.store import PadStore, default_root

    root = store / "pads" if store else default_root()
    batches = PadStore.inspect(root)
    if server is not None:
        link = ServerLink(LinkOptions(ServerAddress.parse_list(server), ca=ca, retry_for_s=0))
        link.close()
        batches = [batch for batch in batches if batch.fingerprint == link.welcome.fingerprint]
    if as_json:
        click.echo(
            json.dumps(
                [
                    {
                        "path": str(batch.path),
                        "fingerprint": batch.fingerprint,
                        "state": batch.state,
                        "slots_total": batch.slots_total,
                        "slots_free": batch.slots_free,
                        "num_bytes": batch.num_bytes,
                        "age_s": round(batch.age_s, 1),
                        "problem": batch.problem,
                    }
                    for batch in batches
                ]
            )
        )
        return
    if not batches:
        click.echo(f"no slots under {root}")
    for batch in batches:
        click.echo(
            f"{batch.fingerprint[:16]}  {batch.state:<8}  {batch.slots_free:>6} of "
            f"{batch.slots_total} free  {batch.num_bytes / 1e6:10.1f} MB  "
            f"{batch.age_s / 3600:6.1f} h old  {batch.problem}".rstrip()
        )
    free = sum(batch.slots_free for batch in batches)
    click.echo(f"{free} slots are free under {root}")


if __name__ == "__main__":
    main()
