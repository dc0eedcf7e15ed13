"""Compiled kernels where no directory can be written, as in a read-only installation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import otpipe

_USE = """
import logging
logging.basicConfig(format="%(name)s: %(message)s")
import numpy as np
from otpipe.client import store_checksum
from otpipe.kernels import cpu
assert cpu.__file__.startswith({root!r}), cpu.__file__
words = np.zeros(1, np.uint64)
cpu.pack_words(np.arange(8, dtype=np.uint64), 1, words)
print(words.tobytes().hex())
print(type(store_checksum.first_bad_row).__name__)
"""


@pytest.fixture
def read_only_copy(tmp_path: Path) -> Path:
    """The package with files where its cache directories would be: even root cannot write there."""
    source = Path(otpipe.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "sample")
    shutil.copytree(source, tmp_path / "otpipe", ignore=ignored)
    for directory in [path for path in (tmp_path / "otpipe").rglob("*") if path.is_dir()]:
        (directory / "__pycache__").write_text("")
    return tmp_path


def run(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ
    }
    return subprocess.run(
        [sys.executable, "-B", "-c", _USE.format(root=str(root))],
        env=inherited | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"} | environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )


def test_kernels_work_without_a_directory_for_them(read_only_copy: Path) -> None:
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"}
    result = run(read_only_copy, **nowhere)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0001020304050607", "CPUDispatcher"]
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("otpipe")]
    assert line.startswith("otpipe.kernels: no directory can be written for compiled kernels")
    assert line.endswith("set NUMBA_CACHE_DIR to a directory of yours")

    cache = read_only_copy / "cache"
    result = run(read_only_copy, NUMBA_CACHE_DIR=str(cache), **nowhere)
    assert result.returncode == 0, result.stderr
    assert "otpipe.kernels" not in result.stderr
    assert list(cache.rglob("*.nbi"))
