"""``torchrun --nproc_per_node=W -m otpipe.serve``: a process per device, rank 0 the gateway."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from otpipe.errors import OtpipeError, RankDied
from otpipe.server.shutdown import ECHO_PATIENCE_S, EXIT_RANK_DIED, EXIT_USAGE, Shutdown

log = logging.getLogger("otpipe.serve")

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


@click.command(context_settings={"show_default": True})
@click.option("--model", required=True, help="Checkpoint directory, or 'sample'.")
@click.option(
    "--weights",
    type=click.Choice(["private", "public"]),
    default="private",
    help="Private: clients learn their logits only. Public: for open weights, far faster.",
)
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
    weights: Literal["private", "public"],
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
        level=logging.WARNING,
        format=f"otpipe: rank {world.rank}: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("otpipe").setLevel(logging.DEBUG if verbose else logging.WARNING)
    logging.getLogger("torch").setLevel(logging.WARNING if verbose else logging.ERROR)
    shutdown = Shutdown(world.rank)
    shutdown.install()

    def bring_up() -> None:
        # Until the plan stands, all ranks meet the same error, and the gateway tells it for all.
        first_speaker = 0
        try:
            from otpipe.server.gateway import ListenOptions
            from otpipe.server.launch import RankOptions, RankPlan, serve_rank

            plan = RankPlan.check(
                RankOptions(
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
                    weights=weights,
                )
            )
            first_speaker = world.rank
            serve_rank(plan, shutdown)
        except RankDied as error:
            shutdown.ask(EXIT_RANK_DIED, str(error), first_speaker)
        except OtpipeError as error:
            shutdown.ask(EXIT_USAGE, str(error), first_speaker)
        except Exception as error:
            log.exception("could not start")
            shutdown.ask(EXIT_RANK_DIED, f"rank {world.rank} died: {error!r}", first_speaker)

    threading.Thread(target=bring_up, name="bring up", daemon=True).start()
    shutdown.wait()


def run() -> None:
    """Entry point: as click's own, but what all ranks would say, the gateway says for them."""
    try:
        main(standalone_mode=False)
    except click.ClickException as error:
        if os.environ.get("RANK", "0") == "0":
            error.show()
        else:
            time.sleep(ECHO_PATIENCE_S)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    run()
