"""What is where in a folder of results, and what is planned there. Nothing is followed, nothing is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dynarep import records
from dynarep.audit.findings import Audit
from dynarep.dag import FORMATS
from dynarep.errors import UserError
from dynarep.experiment import Experiment, Job
from dynarep.statements import TIERS

MOST_ENTRIES = 200_000  # ours: the paper tier has some 25,000
DEEPEST = 6
OWN = ("log", ".transitions", "claims", "report")  # beside the runs
UNFINISHED = re.compile(r"\.seeds=[\d,-]+\..+|\..+\.part")  # locks, checkpoints, temporary files of a job


@dataclass(frozen=True)
class Place:
    """A folder to audit: what lies below `root`. Verdicts and report lie below `pages`."""

    root: Path
    runs: Path
    pages: Path
    figures: Path | None

    def name(self, path: Path) -> str:
        """Return a path as findings give it: relative to the folder."""
        return path.relative_to(self.root).as_posix()

    def verdicts(self, tier: str) -> Path:
        """Return the file of a tier's verdicts."""
        return self.pages / "claims" / f"{tier}.json"

    def report(self, tier: str) -> Path:
        """Return the file of a tier's report."""
        return self.pages / "report" / f"{tier}.html"

    def has_pages(self, tier: str) -> bool:
        """Say whether a tier has been judged or reported."""
        return os.path.lexists(self.verdicts(tier)) or os.path.lexists(self.report(tier))


def find(path: Path, source: str = "runs") -> Place:
    """Return where runs and figures are below a home-like folder, or in a folder of runs.

    Args:
        path: the folder.
        source: of a home: runs (made there) or reference (committed).

    Raises:
        UserError: no such folder, no runs in it, or a link on the way to them.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder. Pass one with results/runs and figures in it, or a folder of runs.")
    home, figures = path / "results" / source, path / "figures"
    for runs in (home, path):
        if runs != path and (runs.is_symlink() or runs.parent.is_symlink()):
            raise UserError(f"{runs}: is a link; it is not followed. Pass the folder that it points to.")
        if runs.is_dir() and any(_like_runs(entry) for entry in os.scandir(runs)):
            pages = path / "results" / "runs" if runs == home else path
            return Place(path, runs, pages, figures if runs == home and os.path.lexists(figures) else None)
    raise UserError(f"{path}: no runs in it. Pass a folder with results/{source} and figures, or a folder of runs.")


def _like_runs(entry: os.DirEntry[str]) -> bool:
    from dynarep.configs import AgentConfig, registry

    return entry.is_dir(follow_symlinks=False) and entry.name in (*registry(AgentConfig), "claims", "report")


@dataclass
class Tree:
    """Folders and files below a folder, relative to it; links and special files are neither."""

    folders: list[Path] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


def walk(place: Place, folder: Path, audit: Audit) -> Tree:
    """List what is below a folder; links, special files and what is too much become findings."""
    tree, todo, count = Tree(), [folder], 0
    if folder.is_symlink():
        audit.find(place.name(folder), "link", "is a link; it is not followed")
        return tree
    while todo:
        here = todo.pop()
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            audit.find(place.name(here), "malformed", f"cannot be read: {error.strerror}")
            continue
        count += len(entries)
        if count > MOST_ENTRIES:
            audit.find(place.name(here), "size", f"more than {MOST_ENTRIES:,} files and folders; the rest was not read")
            return tree
        for entry in entries:
            path = Path(entry.path)
            if entry.is_symlink():
                audit.find(place.name(path), "link", "is a link; it is not followed")
            elif entry.is_dir(follow_symlinks=False):
                tree.folders.append(path.relative_to(folder))
                if len(tree.folders[-1].parts) < DEEPEST:
                    todo.append(path)
            elif entry.is_file(follow_symlinks=False):
                tree.files.append(path.relative_to(folder))
            else:
                audit.find(place.name(path), "link", "is no regular file; it was not opened")
    return tree


# -- what is planned ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """One run that a tier plans."""

    job: Job
    seed: int


@dataclass
class Plan:
    """The runs of some tiers: place below the folder of runs -> run; experiment and tier -> places."""

    runs: dict[Path, Planned] = field(default_factory=dict)
    of: dict[tuple[str, str], list[Path]] = field(default_factory=dict)

    def add(self, experiments: Iterable[Experiment], tier: str) -> None:
        """Add a tier."""
        for experiment in experiments:
            if tier in experiment.tiers():
                places = self.of.setdefault((experiment.key, tier), [])
                for job in experiment.jobs(tier):
                    for seed, folder in zip(job.seeds, job.folders(), strict=True):
                        self.runs.setdefault(folder, Planned(job, seed))
                        places.append(folder)


def tiers_of(place: Place, tree: Tree, drawn: Tree, experiments: Sequence[Experiment], wanted: str | None) -> list[str]:
    """Return the tiers to audit: the one wanted, or those of products, and of what else explains the runs there."""
    if wanted:
        return [wanted]
    chosen = [tier for tier in TIERS if place.has_pages(tier) or Path(tier) in drawn.folders]
    there = {folder for folder in tree.folders if len(folder.parts) == records.DEPTH and folder.parts[0] not in OWN}
    for tier in chosen:
        there -= _planned(experiments, tier)
    while there:  # the tier that explains most comes first: some runs are shared; the largest is slow to make
        left = [tier for tier in TIERS if tier not in chosen]
        explained = {tier: there & _planned(experiments, tier) for tier in left if tier != "paper"}
        if "paper" in left and not any(explained.values()):
            explained["paper"] = there & _planned(experiments, "paper")
        best = max(explained, key=lambda tier: len(explained[tier]), default=None)
        if best is None or not explained[best]:
            break
        chosen.append(best)
        there -= explained[best]
    return [tier for tier in TIERS if tier in chosen]


def _planned(experiments: Sequence[Experiment], tier: str) -> set[Path]:
    return {folder for e in experiments for job in e.jobs(tier) for folder in job.folders()}


def unplanned(
    place: Place, tree: Tree, plan: Plan, experiments: Sequence[Experiment], wanted: str | None, audit: Audit
) -> None:
    """Note files and folders among the runs that nobody planned, and what is left aside on purpose."""
    known = {Path(name) for name in OWN}
    for folder in plan.runs:
        known |= {folder, *folder.parents}
    strange = {folder for folder in tree.folders if folder not in known and folder.parts[0] not in OWN}
    if strange and wanted:
        others = {tier: _planned(experiments, tier) for tier in TIERS if tier != wanted}
        for tier, folders in others.items():
            around = {parent for folder in folders for parent in folder.parents}
            if found := strange & (folders | around):
                count = len({folder for folder in found if folder in folders})
                audit.skip(f"{count} runs of tier {tier}: another tier was asked for")
                strange -= found
    for folder in sorted(strange):
        if folder.parent not in strange:
            seed = "a seed that no experiment plans" if folder.parent in known and folder.name[:5] == "seed=" else ""
            audit.find(
                place.name(place.runs / folder),
                "unplanned",
                f"is {seed or 'a folder that nobody planned, or that a former experiment did'}",
            )
    unfinished = 0
    for file in tree.files:
        top = file.parts[0]
        if UNFINISHED.fullmatch(file.name) and top not in ("claims", "report"):
            unfinished += 1
        elif top in ("claims", "report") and len(file.parts) == 2:
            suffix = {"claims": ".json", "report": ".html"}[top]
            if file.suffix != suffix or file.stem not in TIERS:
                audit.find(place.name(place.runs / file), "unplanned", "is a file that nobody planned")
        elif (
            top not in OWN[:2]
            and not (file.parent in plan.runs and file.name in (records.METRICS, records.MANIFEST))
            and not any(parent in strange for parent in file.parents)
            and not _elsewhere(file, known, wanted)
        ):
            audit.find(place.name(place.runs / file), "unplanned", "is a file that nobody planned")
    if unfinished:
        audit.skip(f"{unfinished} files of unfinished jobs (locks, checkpoints): no results")
    if any(file.parts[0] in OWN[:2] for file in tree.files):
        audit.skip("logs and collected transitions (log, .transitions): no results, never read for a figure or verdict")


def _elsewhere(file: Path, known: set[Path], wanted: str | None) -> bool:
    """Say whether a run's file lies in a folder of a tier that was not asked for."""
    return bool(wanted) and file.name in (records.METRICS, records.MANIFEST) and file.parent not in known


def strange_figures(place: Place, drawn: Tree, experiments: Sequence[Experiment], audit: Audit) -> None:
    """Note files among the figures that nobody planned."""
    assert place.figures is not None
    planned = {
        Path(tier, e.spec.paper, f"{e.spec.id}.{kind}") for e in experiments for tier in e.tiers() for kind in FORMATS
    }
    known = {parent for file in planned for parent in file.parents}
    strange = [folder for folder in drawn.folders if folder not in known]
    for path in sorted({*strange, *(file for file in drawn.files if file not in planned)}):
        if path != Path("README.md") and path.parent not in strange:
            audit.find(place.name(place.figures / path), "unplanned", "is nothing that an experiment shows")
