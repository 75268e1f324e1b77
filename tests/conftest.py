"""Shared fixtures: a home of their own for tests that write; one thread, as every job has; the same random numbers."""

import shutil
from pathlib import Path

import pytest

import dynarep  # noqa: F401  (before PyTorch, which tests import themselves: see dynarep/mkl.py)

CHECKOUT = Path(__file__).resolve().parents[1]
COPIED = ("R1", "R2", "A", "C", "S")  # experiments that a test's own home has


@pytest.hookimpl(trylast=True)  # after -m has chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest tests first, each where another worker begins, so that nobody waits for one in the end.

    `--dist worksteal` cuts the list into a piece per worker; who is done takes the last ones of somebody else's piece.
    """
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    longest = [item for item in items if item.get_closest_marker("first")]
    others = [item for item in items if not item.get_closest_marker("first")]
    piece = -(-len(others) // workers)
    pieces = [[*longest[k::workers], *others[k * piece : (k + 1) * piece]] for k in range(workers)]
    items[:] = [item for part in pieces for item in part]


@pytest.fixture(autouse=True)
def _one_thread_and_the_same_numbers() -> None:
    """What a test draws without a generator of its own must not depend on the tests before it."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def new_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of the tiers, published numbers and a few experiments, where results and figures go.

    Few, because most of these tests read all of them: what they cost must not grow with every new experiment.
    """
    source, home = CHECKOUT / "experiments", tmp_path / "home"
    shutil.copytree(source, home / "experiments", ignore=_other_experiments)
    monkeypatch.setenv("DYNAREP_HOME", str(home))
    return home


def _other_experiments(folder: str, names: list[str]) -> list[str]:
    if Path(folder).name in ("experiments", "tiers", "profiles", "default"):
        return []
    return [name for name in names if name.split("_")[0] not in COPIED]
