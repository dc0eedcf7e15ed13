"""The loop of a rank that is not the gateway: receive a job, do it, answer."""

from __future__ import annotations

from otpipe.pipeline.jobs import Op
from otpipe.pipeline.placement import GATEWAY_RANK
from otpipe.pipeline.stage import Stage
from otpipe.pipeline.transport import Transport


def run_worker(stage: Stage, transport: Transport) -> None:
    """Serve the gateway until it says STOP.

    Raises:
        RankDied: the gateway is gone.
    """
    while True:
        job, payload = transport.receive(GATEWAY_RANK)
        if job.op == Op.STOP:
            return
        answer, result = stage.handle(job, payload)
        transport.send(GATEWAY_RANK, answer, result)
