"""Shared fixtures: a home of their own for tests that write, and one thread, as every job has."""

import shutil
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def new_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of the experiments, where results and figures go."""
    shutil.copytree(CHECKOUT / "experiments", tmp_path / "home" / "experiments")
    monkeypatch.setenv("DYNAREP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
