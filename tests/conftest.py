"""Makes the helper modules of this folder importable, and shares the checkpoints of a session."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from cases import Case


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def case_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Function from a case to its checkpoint directory; built once a session, not to be changed."""
    built: dict[str, Path] = {}

    def directory_of(case: Case) -> Path:
        if case.name not in built:
            built[case.name] = case.build(tmp_path_factory.mktemp(case.name))
        return built[case.name]

    return directory_of
