"""The report of a tier: verdicts, figures, runs and how they were made, in one HTML file that needs no network.

Pure: experiments, verdicts, records and figures in, text out. No clock, so the same inputs give the same bytes; paths
are written below the results folder and links are relative to the page, so it does not matter where all of it lies.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import jinja2

from dynarep import __version__, dag, plan, records
from dynarep.configs import Config
from dynarep.errors import UserError
from dynarep.experiment import Experiment, Job, plain
from dynarep.files import tier_file
from dynarep.report.made import WATTS, cpu_seconds, facts_of
from dynarep.report.words import cpu_time, number, p_value, seeds
from dynarep.schema import Group
from dynarep.statements import TIERS, Effect, RankClaim

if TYPE_CHECKING:  # imports PyTorch
    from dynarep.claims import Verdict

PAPERS = {"madtd": "MAD-TD", "ftfl": "FTFL", "beyond": "Beyond the papers"}
DIALS = "Dial tasks: causes turned up and down"
VERDICTS = {"supported": "✓", "contradicted": "✗", "inconclusive": "?", "untested": "○"}


def build(
    experiments: Sequence[Experiment],
    tier: str,
    verdicts: Sequence[Verdict],
    results: Path,
    figures: Path,
    page: Path | None = None,
) -> str:
    """Return the report of a tier as HTML.

    Args:
        experiments: what is reported, in this order.
        tier: name of the tier.
        verdicts: of `claims.judge_all` for these experiments at this tier.
        results: the folder of runs.
        figures: the folder that holds `<tier>/<paper>/<id>.svg`.
        page: the file that the page is for: links to manifests and figures start there. By default
            `<results>/report/<tier>.html`.

    Raises:
        UserError: unknown tier, or a figure that cannot be read.
    """
    read = _Reader(results, page or results / "report" / f"{tier}.html")
    stated = {claim.id: claim for e in experiments for claim in e.spec.claims}
    effects = {name: claim for name, claim in stated.items() if isinstance(claim, Effect)}
    able = {name: [t for t, role in _roles(claim.tiers) if role != "untested"] for name, claim in stated.items()}
    judged_first = sorted(verdicts, key=lambda v: v.verdict == "untested")
    sections = [_section(e, tier, {v.claim: v for v in verdicts}, read, figures) for e in experiments]
    by_id = {section["spec"].id: section for section in sections}
    dials = [
        (section, [(name, by_id.get(name)) for name in section["spec"].explains.beside])
        for section in sections
        if section["spec"].explains
    ]
    beside = {name: other for _, others in dials for name, other in others if other and other["image"]}
    rows = [
        {
            "v": v,
            "key": f"{v.paper}_{v.experiment}",
            "strip": _strip(v, effects.get(v.claim)),
            "able": able.get(v.claim, []),
            "tiers": " ".join([*(["here"] if v.verdict != "untested" else []), *(able.get(v.claim) or ["none"])]),
        }
        for v in judged_first
    ]
    return _template().render(
        tier=tier,
        purpose=tier_file(tier).purpose,
        tally=tally(verdicts),
        counts=Counter(v.verdict for v in verdicts),
        verdicts=verdicts,
        rows=rows,
        can_judge=Counter(name for row in rows for name in str(row["tiers"]).split()),
        tier_names={"here": "judged here"} | {name: name for name in TIERS} | {"none": "no tier"},
        ranked={name: claim.contrast for name, claim in effects.items() if isinstance(claim, RankClaim)},
        by_key={section["key"]: section for section in sections},
        sections=sections,
        contents=[(paper, list(of)) for paper, of in groupby(sections, key=lambda s: s["spec"].paper)],
        dials_title=DIALS,
        dials=dials,
        shared=[other for other in beside.values() if other["image"]["height"]],
        made=facts_of(list(read.runs.values())),
        watts=WATTS,
        paper_name=PAPERS,
        symbol=VERDICTS,
        version=__version__,
        local=lambda text: text.replace(f"{results}/", ""),
    )


def _roles(tiers: Mapping[Any, str]) -> list[tuple[str, str]]:
    """Return what each tier does with a claim, in the order of the tiers."""
    roles = {str(name): role for name, role in tiers.items()}
    return [(name, roles.get(name, "untested")) for name in TIERS]


@cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("dynarep", "report")
    page = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.filters.update(cpu_time=cpu_time, number=number, p_value=p_value, sha256=_sha256)
    return page.get_template("report.html.j2")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def tally(verdicts: Sequence[Verdict]) -> str:
    """Return the verdicts in a line: "4 supported, 1 contradicted; gated claims: 5 of 5 supported"."""
    counts = Counter(v.verdict for v in verdicts)
    gated = [v for v in verdicts if v.gated]
    kept = sum(v.verdict == "supported" for v in gated)
    parts = ", ".join(f"{counts[name]} {name}" for name in VERDICTS if counts[name]) or "no claims"
    return f"{parts}; " + (f"gated claims: {kept} of {len(gated)} supported" if gated else "no gated claims")


# -- claims -------------------------------------------------------------------------------------------------------


def _strip(verdict: Verdict, claim: Effect | None) -> dict[str, float] | None:
    """Place estimate, interval, no effect and the negligible region on a strip 100 wide; None if there is none."""
    if claim is None:
        return None
    points = (verdict.estimate, verdict.low, verdict.high, claim.no_effect, *claim.negligible())
    log = claim.contrast.kind == "ratio"
    if any(x is None or not math.isfinite(x) or (log and x <= 0) for x in points):
        return None
    values = [math.log(x) if log else float(x) for x in points if x is not None]
    low, wide = min(values), max(values) - min(values)
    names = ("estimate", "low", "high", "no_effect", "near", "far")
    return {name: round(4 + 92 * (x - low) / wide if wide else 50.0, 2) for name, x in zip(names, values, strict=True)}


# -- experiments --------------------------------------------------------------------------------------------------


class _Reader:
    """Reads each run once, however many experiments share it; knows where the page lies."""

    def __init__(self, results: Path, page: Path) -> None:
        self.results = results
        self.page = page
        self.runs: dict[Path, records.RunRecord] = {}
        self.faults: dict[Path, str] = {}

    def __call__(self, job: Job) -> list[records.RunRecord]:
        """Return the runs of a job that are there and can be believed."""
        for seed, folder in zip(job.seeds, job.folders(), strict=True):
            if folder not in self.runs and (self.results / folder / records.MANIFEST).exists():
                try:
                    self.runs[folder] = records.read(self.results / folder, job.config, seed)
                except records.RecordError as error:
                    self.faults[folder] = str(error)
        return [self.runs[folder] for folder in job.folders() if folder in self.runs]

    def address(self, path: Path) -> str:
        """Return a link to a file, relative to the page; empty if there is no such file."""
        return quote(Path(os.path.relpath(path, self.page.parent)).as_posix(), safe="/=,") if path.exists() else ""


def _arm(label: str, jobs: Sequence[Job], read: _Reader) -> dict[str, Any]:
    """Return the runs of one arm on one task."""
    found = [run for job in jobs for run in read(job)]
    planned = [seed for job in jobs for seed in job.seeds]
    return {
        "label": label,
        "job": jobs[0],
        "folder": jobs[0].config.folder(),
        "updates": sum(piece.updates for piece in plan.work(jobs[0])),
        "planned": len(planned),
        "found": len(found),
        "missing": seeds(set(planned) - {run.seed for run in found}),
        "diverged": seeds(run.seed for run in found if (run.series("diverged")[1] > 0).any()),
        "faults": [read.faults[folder] for job in jobs for folder in job.folders() if folder in read.faults],
        "cpu_s": sum(cpu_seconds(run.manifest) for run in found),
        "manifests": [
            (seed, read.address(read.results / folder / records.MANIFEST))
            for job in jobs
            for seed, folder in zip(job.seeds, job.folders(), strict=True)
        ],
    }


def _section(
    experiment: Experiment, tier: str, judged: Mapping[str, Verdict], read: _Reader, figures: Path
) -> dict[str, Any]:
    spec, jobs = experiment.spec, experiment.jobs(tier)
    arms: dict[tuple[str, Path], list[Job]] = {}
    for job in jobs:
        arms.setdefault((job.variant, job.config.folder()), []).append(job)
    groups = [(name, [j for j in jobs if j.group == name]) for name in dict.fromkeys(job.group for job in jobs)]
    settings = [(arm, arm.environment | arm.agent | arm.protocol) for arm in spec.variants.values()]
    set_by_arms = {key for _, own in settings for key in _flat(own)}
    settings = [(arm, ({"agent": arm.algorithm} if arm.algorithm else {}) | own) for arm, own in settings]
    path = figures / tier / spec.paper / f"{spec.id}.svg"
    cells = [_arm(spec.variants[variant].label, of_arm, read) for (variant, _), of_arm in arms.items()]
    return {
        "experiment": experiment,
        "spec": spec,
        "key": experiment.key,
        "what": "table" if spec.table else "figure",
        "absent_at": [name for name in TIERS if name not in experiment.tiers()],
        "judged": [(claim, judged.get(claim.id)) for claim in spec.claims],
        "cells": cells,
        "found": sum(cell["found"] for cell in cells),
        "planned": sum(cell["planned"] for cell in cells),
        "core_hours": sum(cell["cpu_s"] for cell in cells) / 3600,
        "trouble": any(cell["missing"] or cell["diverged"] or cell["faults"] for cell in cells),
        "arms": [(arm.label, {k: plain(v) for k, v in own.items()}) for arm, own in settings],
        "groups": [
            (
                name,
                spec.runs[name],
                experiment.agents(spec.runs[name]),
                _changes(spec.runs[name], tier, own, set_by_arms),
            )
            for name, own in groups
        ],
        "image": _image(path),
        "alt": _alt(experiment, tier, jobs),
        "csv": f"{figures.name}/{tier}/{spec.paper}/{spec.id}.csv",
        "files": [(kind, read.address(path.with_suffix(f".{kind}"))) for kind in ("csv", "svg", "pdf", "png")],
        "target_command": f"snakemake --cores 2 {experiment.key}" + ("" if tier == "ci" else f" --config tier={tier}"),
        "figure_command": f"dynarep figure --experiment {spec.id} --tier {tier}",
        "explain": [
            f"dynarep claims --explain {claim.id} --tier {tier}"
            for claim in spec.claims
            if dict(_roles(claim.tiers))[tier] != "untested"
        ],
        "train": [f"dynarep train {dag.arguments([job])}" for job in jobs],
    }


def _image(path: Path) -> dict[str, Any] | None:
    """Return a figure as a data URI (so that identifiers cannot clash) and its size in CSS pixels, if it says."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
    found = [re.search(rb'<svg[^>]*\s%s="([0-9.]+)pt"' % side, data) for side in (b"width", b"height")]
    width, height = (round(float(side[1]) * 4 / 3) if side else None for side in found)
    return {
        "uri": f"data:image/svg+xml;base64,{base64.b64encode(data).decode()}",
        "width": width,
        "height": height if width else None,
    }


def _alt(experiment: Experiment, tier: str, jobs: Sequence[Job]) -> str:
    spec = experiment.spec
    if spec.from_defaults:
        return f"Table {spec.id}: {spec.title} Read from the code. The caption follows; the CSV holds every cell."
    tasks = _some(dict.fromkeys(job.task for job in jobs), "tasks")
    panels = "; ".join(f"{panel.label} ({panel.kind})" for panel in spec.panels)
    arms = _some([spec.variants[name].label for name in dict.fromkeys(job.variant for job in jobs)], "arms")
    shows = f"A cell per task and arm: {spec.table.label}" if spec.table else f"Panels from top to bottom: {panels}"
    return (
        f"{'Table' if spec.table else 'Figure'} {spec.id} at the {tier} tier: {spec.title} {shows}. "
        f"Tasks: {tasks}. Arms: {arms}. The caption follows; the CSV holds every number."
    )


def _some(names: Iterable[str], what: str) -> str:
    """Write names, or of many only how many: nobody listens to a description of a minute."""
    listed = list(names)
    return ", ".join(listed) if len(listed) <= 8 else f"{len(listed)} {what}, named below"


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with those inside another one (dials) by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = value.model_dump() if isinstance(value, Config) else value
        flat |= {f"{key}.{name}": x for name, x in _flat(inner).items()} if isinstance(inner, dict) else {key: value}
    return flat


def _fields(part: type[Config], before: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield dotted name, default and its source of every setting, also of those inside another one."""
    for key, info in part.model_fields.items():
        if isinstance(info.default, Config):
            yield from _fields(type(info.default), f"{before}{key}.")
        else:
            yield f"{before}{key}", info.default, info.description or ""


def _changes(group: Group, tier: str, jobs: Sequence[Job], arms: set[str]) -> list[dict[str, Any]]:
    """Return the settings of a group's jobs that differ from the defaults, except `arms`, those that arms set."""
    budget = set(tier_file(tier).budget).union(*group.blocks(tier))
    rows: dict[tuple[str, str], dict[str, Any]] = {}  # agents that share a field share a row
    for job in jobs:
        for part in (job.config.environment, job.config.agent, job.config.protocol):
            values = _flat(dict(part))
            for key, standard, source in _fields(type(part)):
                default = plain(standard)
                row = {"key": key, "default": default, "source": source, "here": {}}
                here = rows.setdefault((key, default), {**row, "by_tier": key in budget})["here"]
                here.setdefault(plain(values[key]), {})[job.task] = None  # a dict: tasks once, in order
    changed = [
        r for r in rows.values() if r["key"] not in arms | {"suite", "task"} and set(r["here"]) != {r["default"]}
    ]
    return sorted(changed, key=lambda row: not row["by_tier"])
