"""The runs: each by itself, then against those trained beside it, then all that stand behind one figure."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from dynarep import plan as planning
from dynarep import records, registration
from dynarep.audit import contents
from dynarep.audit.findings import Audit
from dynarep.audit.places import Place, Plan, Planned
from dynarep.experiment import Experiment
from dynarep.files import checkout
from dynarep.manifests import Manifest, Stop

ROUNDING = timedelta(seconds=2)  # ours: times are written in whole seconds
SKEW = timedelta(minutes=10)  # ours: clocks of two machines
OWN_KEYS = {"seed", "files"}  # of a manifest, which the others of its block do not share
RECORDED = {"claims": "rules of claims", "block": "hashes of seeds trained together", "started": "when a run began"}


@dataclass
class Runs:
    """What could be read: place below the folder of runs -> record; and the places that could not."""

    found: dict[Path, records.RunRecord] = field(default_factory=dict)
    said: dict[Path, Manifest] = field(default_factory=dict)
    bad: set[Path] = field(default_factory=set)
    shown: set[tuple[str, str]] = field(default_factory=set)  # experiment and tier that something is there of


def check(place: Place, plan: Plan, experiments: Sequence[Experiment], whole: Iterable[str], audit: Audit) -> Runs:
    """Check every planned run. Of the tiers in `whole` every experiment must be there, of others what was begun."""
    runs = Runs()
    for folder, planned in plan.runs.items():
        if os.path.lexists(place.runs / folder):
            _read(place, folder, planned, runs, audit)
    complete = set(whole)
    for (key, tier), folders in plan.of.items():
        there = [folder for folder in folders if folder in runs.found or folder in runs.bad]
        if not (there or tier in complete or _drawn(place, key, tier)):
            audit.skip(f"{key} at tier {tier}: nothing of it is here")
            continue
        runs.shown.add((key, tier))
        for folder in folders:
            if folder not in runs.found and folder not in runs.bad:
                audit.find(place.name(place.runs / folder), "missing", f"a run that {key} needs at tier {tier}")
    _twice(place, runs, audit)
    _together(place, plan, runs, audit)
    _made(place, plan, runs, audit)
    for (key, tier), folders in plan.of.items():
        paper, _, name = key.partition("_")
        figure = f"figures/{tier}/{paper}/{name}.csv"
        _mixtures(figure, [runs.said[folder] for folder in folders if folder in runs.said], audit)
    _rules(place, experiments, plan, runs, audit)
    for name, what in RECORDED.items():
        if silent := sum(getattr(manifest, name) is None for manifest in runs.said.values()):
            audit.skip(f"{what}: not recorded by {silent} of {len(runs.said)} runs")
    return runs


def _drawn(place: Place, key: str, tier: str) -> bool:
    """Say whether there is a figure of an experiment."""
    paper, _, name = key.partition("_")
    return place.figures is not None and os.path.lexists(place.figures / tier / paper / f"{name}.csv")


# -- one run ------------------------------------------------------------------------------------------------------


def _read(place: Place, folder: Path, planned: Planned, runs: Runs, audit: Audit) -> None:
    """Read one run, check it by itself."""
    path, config = place.runs / folder, planned.job.config
    audit.checked["runs"] += 1
    try:
        record = records.read(path, config, planned.seed)
    except records.RecordError as error:
        runs.bad.add(folder)
        audit.find(*_explained(place, path, error))
        return
    runs.found[folder], manifest = record, Manifest.model_validate(record.manifest)
    runs.said[folder] = manifest
    metrics = place.name(path / records.METRICS)
    wrong = list(contents.faults(config, record))
    for kind, message in wrong:
        audit.find(metrics, kind, message)
    if "malformed" not in dict(wrong):
        stated = manifest.files[records.METRICS].sha256
        if hashlib.sha256(contents.canonical(record)).hexdigest() != stated:
            audit.find(metrics, "malformed", "numbers are not written as runs write them")
    for message in _times(manifest, contents.units(config)):
        audit.find(place.name(path / records.MANIFEST), "time", message)


def _explained(place: Place, run: Path, error: records.RecordError) -> tuple[str, str, str]:
    """Return path, kind and message of what is wrong with a run, without the advice to train it again."""
    text = str(error)
    for file in (run / records.MANIFEST, run / records.METRICS, run):
        if text.startswith(f"{file}: "):
            text = re.split(r"\.? (?:Delete|Move|Type) ", text.removeprefix(f"{file}: "))[0]
            return place.name(file), error.kind, text.replace(f"{place.root}/", "")
    return place.name(run), error.kind, text


def _times(manifest: Manifest, units: int) -> Iterator[str]:
    """Yield what contradicts itself in times, costs and the history of stops."""
    now, before, last = datetime.now(UTC), 0, None
    final = Stop(
        stopped_at=units, wall_s=manifest.cost.wall_s, cpu_s=manifest.cost.cpu_s, started=manifest.started,
        at=manifest.written,
    )  # fmt: skip
    for number, stop in enumerate((*manifest.resumed, final), 1):
        who = f"process {number} of {len(manifest.resumed) + 1}"
        began, ended = (None if text is None else datetime.fromisoformat(text) for text in (stop.started, stop.at))
        if not before < stop.stopped_at <= units - (stop is not final):
            yield f"{who} stopped at {stop.stopped_at} of {units}, after a stop at {before}"
        before = stop.stopped_at
        for what, moment in (("began", began), ("ended", ended)):
            if moment and moment > now + SKEW:
                yield f"{who} {what} in the future: {moment.isoformat()}"
        if began and ended and ended < began:
            yield f"{who} ended before it began"
        if began and last and began < last:
            yield f"{who} began before the one before it ended"
        if began and ended and timedelta(seconds=stop.wall_s) > ended - began + ROUNDING:
            yield f"{who} took {stop.wall_s:.0f} s, {(ended - began).total_seconds():.0f} s passed"
        if manifest.machine.get("threads") == 1 and stop.cpu_s > 1.5 * stop.wall_s + 2:
            yield f"{who} used {stop.cpu_s:.0f} s of one thread in {stop.wall_s:.0f} s"
        last = ended or last
    if manifest.block is not None and manifest.cost.seeds_in_job != len(manifest.block):
        yield f"{manifest.cost.seeds_in_job} seeds in the job, {len(manifest.block)} hashes in its block"


# -- runs beside each other ---------------------------------------------------------------------------------------


def _twice(place: Place, runs: Runs, audit: Audit) -> None:
    """Seeds never have the same metrics; arms that a short run does not tell apart may."""
    by_content: dict[str, list[Path]] = {}
    for folder, manifest in runs.said.items():
        by_content.setdefault(manifest.files[records.METRICS].sha256, []).append(folder)
    for same in by_content.values():
        if len({runs.found[folder].seed for folder in same}) > 1:
            first, *others = (place.name(place.runs / folder) for folder in same)
            audit.find(first, "duplicate", f"has the same metrics as another seed: {', '.join(others)}")


def _together(place: Place, plan: Plan, runs: Runs, audit: Audit) -> None:
    """What one process wrote must agree: hashes of each other's metrics, the manifests, when what was measured."""
    parts: dict[Path, list[Path]] = {}
    for folder in runs.found:
        parts.setdefault(folder.parent, []).append(folder)
    for folders in parts.values():
        shapes: dict[tuple[Any, ...], list[Path]] = {}
        for folder in folders:
            columns = runs.found[folder].columns
            shape = tuple(hashlib.sha256(repr(columns[c].tolist()).encode()).hexdigest() for c in records.COLUMNS[:4])
            shapes.setdefault(shape, []).append(folder)
            _vouches(place, folder, runs, audit)
        usual = max(shapes.values(), key=len)
        for odd in shapes.values():
            for folder in odd if odd is not usual else ():
                path = place.name(place.runs / folder / records.METRICS)
                audit.find(path, "rows", f"has other rows than {usual[0].name} of the same configuration")


def _vouches(place: Place, folder: Path, runs: Runs, audit: Audit) -> None:
    """Check what a manifest says of the seeds that its process trained beside it."""
    block = runs.said[folder].block
    if block is None:
        return
    seed, path = runs.found[folder].seed, place.name(place.runs / folder / records.MANIFEST)
    if str(seed) not in block:
        audit.find(path, "block", "its own seed is not among those trained together")
    for other, stated in block.items():
        beside = folder.parent / f"seed={other}"
        if beside not in runs.said:
            continue
        if runs.said[beside].files[records.METRICS].sha256 != stated:
            which = "its own metrics" if beside == folder else f"seed {other}, trained by the same process,"
            audit.find(path, "block", f"says that {which} had other content: {stated[:8]}...")
        elif runs.said[beside].block == block and beside > folder:
            mine, theirs = runs.found[folder].manifest, runs.found[beside].manifest
            keys = [key for key in sorted({*mine, *theirs} - OWN_KEYS) if mine.get(key) != theirs.get(key)]
            if keys:
                audit.find(path, "block", f"differs from seed {other} of the same process in: {', '.join(keys)}")


# -- what stands behind a figure ----------------------------------------------------------------------------------


@cache
def pins(root: Path) -> Mapping[str, str]:
    """Return the versions that the lock pins: name -> version."""
    file = root / "requirements.lock"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, flags=re.MULTILINE))


def _made(place: Place, plan: Plan, runs: Runs, audit: Audit) -> None:
    """Compare code, lock and versions with this checkout's; one finding for all runs that differ alike."""
    groups: dict[tuple[str, str], list[Path]] = {}
    for folder, manifest in runs.said.items():
        code, lock = _ours(plan.runs[folder])
        if manifest.code.fingerprint != code:
            groups.setdefault(("other code than this checkout's", manifest.code.fingerprint[:8]), []).append(folder)
        if manifest.lock != lock:
            groups.setdefault(("another lock than this checkout's", manifest.lock[:8]), []).append(folder)
            continue
        for name, version in manifest.versions.items():
            if pins(checkout()).get(name, version) != version:
                what = f"{name} {version}, which is not the version in the lock that they name"
                groups.setdefault((what, pins(checkout())[name]), []).append(folder)
    for (what, value), folders in groups.items():
        first = place.name(place.runs / folders[0] / records.MANIFEST)
        audit.find(first, "provenance", f"{len(folders)} run(s) were made by {what} ({value}), this one first")


@cache
def _fingerprints() -> dict[tuple[str, str], tuple[str, str]]:
    return {}


def _ours(planned: Planned) -> tuple[str, str]:
    """Return the fingerprint and lock of a run made now; once per pair of agent and protocol."""
    config = planned.job.config
    key = (config.agent.implementation, config.protocol.implementation)
    if key not in _fingerprints():
        _fingerprints()[key] = planning.ours(planned.job)
    return _fingerprints()[key]


def _mixtures(figure: str, said: Sequence[Manifest], audit: Audit) -> None:
    """Note what differs among the runs of one figure and must not."""
    facts: dict[str, dict[str, int]] = {}
    for manifest in said:
        config = manifest.config
        names = f"{config['agent']['name']} with {config['protocol']['name']}"
        mine = {f"code of {names}": manifest.code.fingerprint[:8], "lock": manifest.lock[:8]}
        mine |= {name: manifest.versions.get(name, "not recorded") for name in {"python", *manifest.versions}}
        mine |= {name: str(manifest.machine.get(name, "not recorded")) for name in records.MACHINE}
        for name, value in mine.items():
            counts = facts.setdefault(name, {})
            counts[value] = counts.get(value, 0) + 1
    for name, counts in facts.items():
        total = len(said) if not name.startswith("code of") else sum(counts.values())
        if len(counts) > 1 or sum(counts.values()) < total:
            values = ", ".join(f"{value} ({count} runs)" for value, count in counts.items())
            audit.find(figure, "mixture", f"its runs differ in {name}: {values}")


def _rules(place: Place, experiments: Sequence[Experiment], plan: Plan, runs: Runs, audit: Audit) -> None:
    """Compare the claims' rules with those that the manifests carry."""
    now = registration.registered(experiments)
    older: dict[str, list[Path]] = {}
    for folder, manifest in runs.said.items():
        rules, carried = now.get(plan.runs[folder].job.config.identity(), {}), manifest.claims
        for claim in () if carried is None else {*rules, *carried}:
            if rules.get(claim) != (carried or {}).get(claim):
                older.setdefault(claim, []).append(folder)
    for claim, folders in sorted(older.items()):
        first = place.name(place.runs / folders[0] / records.MANIFEST)
        what = f"{len(folders)} run(s), this one first, carry another rule of claim {claim} than the one in force"
        audit.find(first, "rule", f"{what}: it is younger than they are")
