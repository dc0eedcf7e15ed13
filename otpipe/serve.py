"""``torchrun --nproc_per_node=W -m otpipe.serve``: a process per device, rank 0 the gateway."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import click

from otpipe.errors import OtpipeError, RankDied, UsageError

log = logging.getLogger("otpipe.serve")

EXIT_USAGE = 2
EXIT_RANK_DIED = 70
SAMPLE_MODEL = Path(__file__).parent / "sample"


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, as torchrun tells it."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> World:
        """Read torchrun's variables; a process started without torchrun is a world of one."""
        if "RANK" not in os.environ:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            return cls(0, 0, 1)
        return cls(
            int(os.environ["RANK"]),
            int(os.environ.get("LOCAL_RANK", "0")),
            int(os.environ["WORLD_SIZE"]),
        )


class Shutdown:
    """The one way in which a rank's process ends, whoever asks for it."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._event = threading.Event()
        self._lock = threading.Lock()
        self.exit_code = 0
        self.sentence = ""

    def ask(self, exit_code: int, sentence: str) -> None:
        """End with this code and sentence, unless something else asked first."""
        with self._lock:
            if not self._event.is_set():
                self.exit_code, self.sentence = exit_code, sentence
                self._event.set()

    def wait(self) -> None:
        """Block the main thread, so that signals are handled, until someone asks for the end."""
        while not self._event.wait(0.5):
            pass

    def on_signal(self, number: int, _frame: object) -> None:
        """SIGTERM and SIGINT. torchrun sends SIGTERM when a rank died: let liveness name it."""
        if not self._event.is_set():
            threading.Timer(
                0.5 if self._rank == 0 else 0.0,
                self.ask,
                (0, f"stopped by {signal.Signals(number).name}"),
            ).start()


@click.command(context_settings={"show_default": True})
@click.option("--model", required=True, help="Checkpoint directory, or 'sample'.")
@click.option("--weights", type=click.Choice(["public", "private"]), default="public")
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=int, default=7431, help="0 picks a free port.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option(
    "--transport",
    type=click.Choice(["auto", "gloo", "nccl"]),
    default="auto",
    help="Between ranks; auto is nccl on CUDA, gloo on CPU. gloo on CUDA uses pinned host memory.",
)
@click.option("--tls-cert", type=click.Path(path_type=Path), help="PEM certificate chain.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="PEM private key.")
@click.option(
    "--insecure-plaintext", is_flag=True, help="Listen off loopback without TLS, knowingly."
)
@click.option("--max-clients", type=click.IntRange(1, 4096), default=64)
@click.option(
    "--threads", type=click.IntRange(1), help="CPU threads a rank [default: the cores it may use]."
)
@click.option("--audit", is_flag=True, help="On ending, say what the server saw of its clients.")
@click.option("--verbose", is_flag=True, help="Log every client's coming and going.")
def main(
    model: str,
    weights: str,
    host: str,
    port: int,
    device: str,
    transport: str,
    tls_cert: Path | None,
    tls_key: Path | None,
    insecure_plaintext: bool,
    max_clients: int,
    threads: int | None,
    audit: bool,
    verbose: bool,
) -> None:
    """Serve a model to private clients. Start it with torchrun, one process per device."""
    world = World.from_environment()
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format=f"otpipe: rank {world.rank}: %(message)s",
        stream=sys.stderr,
    )
    if not verbose:
        logging.getLogger("torch").setLevel(logging.ERROR)
    from otpipe.server.gateway import ListenOptions
    from otpipe.server.launch import RankOptions, serve_rank

    shutdown = Shutdown(world.rank)
    signal.signal(signal.SIGTERM, shutdown.on_signal)
    signal.signal(signal.SIGINT, shutdown.on_signal)
    try:
        if weights == "private":
            raise UsageError(
                "--weights private is not there yet: this release serves public weights only; "
                "start with --weights public"
            )
        options = RankOptions(
            model_dir=SAMPLE_MODEL if model == "sample" else Path(model),
            rank=world.rank,
            local_rank=world.local_rank,
            world_size=world.world_size,
            device=device,
            transport=transport,
            threads=threads,
            audit=audit,
            listen=ListenOptions(
                host=host,
                port=port,
                tls_cert=tls_cert,
                tls_key=tls_key,
                insecure_plaintext=insecure_plaintext,
                max_clients=max_clients,
            ),
        )
        ending = serve_rank(options, shutdown.ask)
    except RankDied as error:
        _exit(EXIT_RANK_DIED, str(error))
    except OtpipeError as error:
        _exit(EXIT_USAGE, str(error))
    shutdown.wait()
    ending()
    _exit(shutdown.exit_code, shutdown.sentence if world.rank == 0 or shutdown.exit_code else "")


def _exit(code: int, sentence: str) -> None:
    """Say why and end at once: threads may be blocked in a collective that will never return."""
    if sentence:
        print(f"otpipe: {sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
