"""What was touched -> what Snakemake plans: nothing stale survives, nothing unrelated is made again.

The Snakefile, its package and experiments are the real ones, copied; only the commands are replaced: they just write
what they declare. What Snakemake cannot see (a file altered under its old date) is found by `dynarep audit`.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from conftest import CHECKOUT
from dynarep import dag
from dynarep.experiment import Experiment, Job, load_all

TIER = "{tier: smoke, purpose: x, budget: {seeds: 2}}"  # a process per job and figure
SNAKEMAKE = [sys.executable, "-m", "snakemake", "-s", "Snakefile"]
SNAKEMAKE += ["--profile", "experiments/profiles/default", "--config", "tier=smoke"]
Edit = Callable[[str], str | None]  # a file's text -> the new one; None deletes it


class Touched(NamedTuple):
    """A change and what it must plan.

    Args:
        file: below the checkout's copy.
        edit: what becomes of it.
        trains: which jobs are to be trained.
        draws: ids of the figures drawn besides those whose runs are trained.
        claims: whether verdicts are made again though nothing is trained.
        report: whether the page is, though nothing else is.
    """

    file: str
    edit: Edit
    trains: Callable[[Job], bool] = lambda job: False
    draws: tuple[str, ...] = ()
    claims: bool = False
    report: bool = True


def says(path: str, value: object) -> Edit:
    """Set a value of a YAML file, by its dotted path."""

    def edit(text: str) -> str:
        data = part = yaml.safe_load(text)
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in parents:
            part = part[key]
        assert part[last] != value
        part[last] = value
        return yaml.safe_dump(data, sort_keys=False)

    return edit


def added(line: str) -> Edit:
    return lambda text: f"{text}\n{line}\n"


def deleted(text: str) -> None:
    return None


def table(home: Path, everything: list[Experiment]) -> dict[str, Touched]:
    """Return every change by its name."""
    ids = tuple(experiment.spec.id for experiment in everything)
    r1 = next(experiment for experiment in everything if experiment.spec.id == "R1")
    run = r1.jobs("smoke")[0].folders()[0]
    file = str(r1.file.relative_to(home))
    shows_published = tuple(e.spec.id for e in everything if e.spec.published)
    bounded = next(k for k, claim in enumerate(yaml.safe_load(r1.file.read_text())["claims"]) if "smallest" in claim)

    def of(*agents: str) -> Callable[[Job], bool]:
        return lambda job: job.config.agent.name in agents

    def this(job: Job) -> bool:
        return run in job.folders()

    return {
        "nothing": Touched("README.md", added("x"), report=False),
        "a comment in an agent": Touched("src/dynarep/agents/mad_td.py", added("# x"), report=False),
        "an agent": Touched("src/dynarep/agents/mad_td.py", added("X = 1"), of("mad_td"), draws=("T1b",)),
        "an agent that another one imports": Touched("src/dynarep/agents/sac.py", added("X = 1"), of("sac", "mbpo")),
        "a protocol": Touched("src/dynarep/protocols/model_fit.py", added("X = 1"), of("ensemble")),
        "a caption": Touched(file, says("caption", "Another."), draws=("R1",), claims=True),
        "a claim's bound": Touched(file, says(f"claims.{bounded}.smallest", 1.23), draws=("R1",), claims=True),
        "the lock": Touched("requirements.lock", added("# x"), lambda job: True),
        "a deleted intermediate": Touched(f"results/runs/{run}/metrics.csv", deleted, this),
        "a deleted manifest": Touched(f"results/runs/{run}/manifest.json", deleted, this),
        "an altered intermediate": Touched(f"results/runs/{run}/metrics.csv", added("x"), draws=("R1",)),
        "an altered manifest": Touched(f"results/runs/{run}/manifest.json", added("x"), claims=True),
        "a deleted figure": Touched("figures/smoke/madtd/R1.png", deleted, draws=("R1",)),
        "deleted verdicts": Touched("results/runs/claims/smoke.json", deleted, claims=True),
        "a deleted page": Touched("results/runs/report/smoke.html", deleted),
        "what draws": Touched("src/dynarep/figures/drawing.py", added("X = 1"), draws=ids),
        "what judges": Touched("src/dynarep/claims.py", added("X = 1"), claims=True),
        "the page's template": Touched("src/dynarep/report/report.html.j2", added("x")),
        "published numbers": Touched("experiments/published.csv", lambda t: t[:-1], draws=shows_published, claims=True),
    }  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A copy of what the DAG is made of, with three experiments, all of whose files are there."""
    for name in ("Snakefile", "requirements.lock", "requirements-torch.txt", "README.md"):
        shutil.copy(CHECKOUT / name, tmp_path / name)
    shutil.copytree(CHECKOUT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copytree(CHECKOUT / "experiments", tmp_path / "experiments")
    for file in (tmp_path / "experiments").glob("[!tp]*/*.yaml"):
        if file.name.split("_")[0] not in ("R1", "T1b", "A", "C"):
            file.unlink()
    (tmp_path / "experiments/tiers/smoke.yaml").write_text(TIER)
    snakefile = tmp_path / "Snakefile"
    text, commands = re.subn(r'"python -m dynarep [^"]*"', '"echo {rule} | tee {output} >{log}"', snakefile.read_text())
    assert commands == 5
    snakefile.write_text(text)
    monkeypatch.setenv("DYNAREP_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "src"))
    snakemake(tmp_path)
    return tmp_path


def snakemake(home: Path, *arguments: str) -> str:
    done = subprocess.run([*SNAKEMAKE, *arguments], cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def planned(home: Path) -> set[str]:
    """Return the names of the rules that a dry run would run."""
    text = snakemake(home, "--dry-run")
    rows = re.findall(r"^(\w\S*) +\d+$", text, re.MULTILINE)
    assert rows or "Nothing to be done" in text, text
    return set(rows) - {"total", "all"}


@contextmanager
def touched(home: Path, change: Touched) -> Iterator[None]:
    """Make a change; undo it afterwards as if it had never been."""
    path, kept = home / change.file, home / "kept"
    shutil.copy2(path, kept)
    text = change.edit(path.read_text())
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    yield
    kept.replace(path)


def expected(change: Touched, everything: list[Experiment]) -> set[str]:
    """Return the rules that a change must plan; of a process that trains several jobs all are made again."""
    trained = [bundle for bundle in dag.bundles(dag.load("smoke")[1]) if any(map(change.trains, bundle.jobs))]
    ids = {*change.draws, *(job.experiment for bundle in trained for job in bundle.jobs)}
    rules = {bundle.name for bundle in trained} | {f"draw_{e.key}" for e in everything if e.spec.id in ids}
    rules |= {"claims"} if trained or change.claims else set()
    return rules | ({"report"} if change.report else set())


@pytest.mark.slow
def test_what_was_touched_is_made_again_and_nothing_else(home):
    everything = load_all()
    changes = table(home, everything)
    found = {}
    for name, change in changes.items():
        with touched(home, change):
            found[name] = planned(home)
    assert found == {name: expected(change, everything) for name, change in changes.items()}
    assert all(len(found[name]) > 3 for name in ("an agent", "a protocol")), "they train something"
