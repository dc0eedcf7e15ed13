"""How busy the ranks and the GPUs are while something else is measured."""

from __future__ import annotations

import contextlib
import ctypes
import re
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import click
import harness

GPU_PERIOD_S = 0.1


def ranks() -> list[int]:
    """Process of each rank of the one server that is running, by rank."""
    found: dict[int, int] = {}
    for pid in harness.rank_pids():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            rank = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
            if rank:
                found[int(rank.group(1))] = pid
    return [found[rank] for rank in sorted(found)]


class _Utilization(ctypes.Structure):
    """nvmlUtilization_t, percent."""

    _fields_: ClassVar = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class GpuMonitor:
    """Share of time in which each GPU had a kernel to run, as the driver samples it.

    Read from NVML, the library that nvidia-smi stands on; see its nvmlDeviceGetUtilizationRates.
    """

    def __init__(self) -> None:
        self._samples: list[tuple[float, list[int]]] = []  # monotonic seconds, percent by GPU
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._check(self._nvml.nvmlInit_v2())
        count = ctypes.c_uint()
        self._check(self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)))
        self._devices = [ctypes.c_void_p() for _ in range(count.value)]
        for index, device in enumerate(self._devices):
            self._check(
                self._nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device))
            )

    def sample(self) -> None:
        """Look once."""
        percent = []
        for device in self._devices:
            rates = _Utilization()
            self._check(self._nvml.nvmlDeviceGetUtilizationRates(device, ctypes.byref(rates)))
            percent.append(int(rates.gpu))
        self._samples.append((time.monotonic(), percent))

    def mean_percent(self, began_s: float, ended_s: float) -> list[float]:
        """By GPU, between two times of the monotonic clock; empty where nothing was sampled."""
        within = [percent for at_s, percent in self._samples if began_s <= at_s <= ended_s]
        return [statistics.fmean(column) for column in zip(*within, strict=True)]

    @staticmethod
    def _check(code: int) -> None:
        if code != 0:
            raise OSError(f"NVML failed with code {code}")


@contextmanager
def gpu_monitor(device: str) -> Iterator[GpuMonitor | None]:
    """A monitor that samples while the block runs; None on a CPU, or where NVML does not answer."""
    monitor = None
    if device == "cuda":
        try:
            monitor = GpuMonitor()
            monitor.sample()
        except (OSError, AttributeError) as error:  # no library, no permission, an older function
            click.echo(f"no figures of the GPU: {error}", err=True)
            monitor = None
    if monitor is None:
        yield None
        return
    watched, stop = monitor, threading.Event()

    def watch() -> None:
        while not stop.wait(GPU_PERIOD_S):
            watched.sample()

    sampler = threading.Thread(target=watch, daemon=True)
    sampler.start()
    try:
        yield monitor
    finally:
        stop.set()
        sampler.join()
