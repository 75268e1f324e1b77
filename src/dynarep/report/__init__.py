"""The report of a tier: verdicts, figures, runs and how they were made, in one HTML file that needs no network.

Pure: experiments, verdicts, records and figures in, text out. No clock, so the same inputs give the same bytes; paths
are written below the results folder, so it does not matter where that folder is.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from dynarep import __version__, dag, plan, records
from dynarep.configs import Config
from dynarep.errors import UserError
from dynarep.experiment import Experiment, Job, plain, span
from dynarep.files import tier_file
from dynarep.schema import Group
from dynarep.statements import TIERS, Effect, RankClaim

if TYPE_CHECKING:  # imports PyTorch
    from dynarep.claims import Verdict

PAPERS = {"madtd": "MAD-TD", "ftfl": "FTFL", "beyond": "Beyond the papers"}
DIALS = "Dial tasks: causes turned up and down"
VERDICTS = {"supported": "✓", "contradicted": "✗", "inconclusive": "?", "untested": "○"}


def build(
    experiments: Sequence[Experiment], tier: str, verdicts: Sequence[Verdict], results: Path, figures: Path
) -> str:
    """Return the report of a tier as HTML.

    Args:
        experiments: what is reported, in this order.
        tier: name of the tier.
        verdicts: of `claims.judge_all` for these experiments at this tier.
        results: the folder of runs.
        figures: the folder that holds `<tier>/<paper>/<id>.svg`.

    Raises:
        UserError: unknown tier, or a figure that cannot be read.
    """
    read = _Reader(results)
    claims = {claim.id: claim for e in experiments for claim in e.spec.claims if isinstance(claim, Effect)}
    judged_first = sorted(verdicts, key=lambda v: v.verdict == "untested")
    sections = [_section(e, tier, {v.claim: v for v in verdicts}, read, figures) for e in experiments]
    by_id = {section["spec"].id: section for section in sections}
    dials = [
        (section, [(name, by_id.get(name)) for name in section["spec"].explains.beside])
        for section in sections
        if section["spec"].explains
    ]
    beside = {name: other for _, others in dials for name, other in others if other and other["image"]}
    return _template().render(
        tier=tier,
        purpose=tier_file(tier).purpose,
        tally=tally(verdicts),
        counts=Counter(v.verdict for v in verdicts),
        verdicts=verdicts,
        rows=[(v, f"{v.paper}_{v.experiment}", _strip(v, claims.get(v.claim))) for v in judged_first],
        ranked={name: claim.contrast for name, claim in claims.items() if isinstance(claim, RankClaim)},
        keys={e.key for e in experiments},
        sections=sections,
        dials_title=DIALS,
        dials=dials,
        shared=[other for other in beside.values() if other["image"]["height"]],
        made=_made(list(read.runs.values())),
        paper_name=PAPERS,
        symbol=VERDICTS,
        version=__version__,
        local=lambda text: text.replace(f"{results}/", ""),
    )


@cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("dynarep", "report")
    page = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.filters.update(number=number, p_value=p_value, sha256=_sha256)
    return page.get_template("report.html.j2")


def tally(verdicts: Sequence[Verdict]) -> str:
    """Return the verdicts in a line: "4 supported, 1 contradicted; gated claims: 5 of 5 supported"."""
    counts = Counter(v.verdict for v in verdicts)
    gated = [v for v in verdicts if v.gated]
    kept = sum(v.verdict == "supported" for v in gated)
    parts = ", ".join(f"{counts[name]} {name}" for name in VERDICTS if counts[name]) or "no claims"
    return f"{parts}; " + (f"gated claims: {kept} of {len(gated)} supported" if gated else "no gated claims")


# -- words --------------------------------------------------------------------------------------------------------


def number(value: Any) -> str:
    """Write a number with three digits, an exponent only where it is needed, and a minus sign that is one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if isinstance(value, int) or 1e3 <= abs(value) < 1e6:
        return f"{value:,.0f}".replace(",", "\u202f").replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def p_value(value: float | None) -> str:
    """Write a p-value; "–" where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _seeds(seeds: Iterable[int]) -> str:
    """Write seeds, e.g. "seeds 0-3,7"; nothing for none."""
    listed = sorted(seeds)
    return f"seed{'s' * (len(listed) > 1)} {span(listed)}" if listed else ""


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


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
    """Reads each run once, however many experiments share it."""

    def __init__(self, results: Path) -> None:
        self.results = results
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
        "missing": _seeds(set(planned) - {run.seed for run in found}),
        "diverged": _seeds(run.seed for run in found if (run.series("diverged")[1] > 0).any()),
        "faults": [read.faults[folder] for job in jobs for folder in job.folders() if folder in read.faults],
        "cpu_s": sum(cpu_seconds(run.manifest) for run in found),
    }


def cpu_seconds(manifest: Mapping[str, Any]) -> float:
    """Return a run's share of its job's CPU seconds, those before a resume included."""
    cost = manifest.get("cost", {})
    spent = cost.get("cpu_s", 0.0) + sum(stop.get("cpu_s", 0.0) for stop in manifest.get("resumed", []))
    return float(spent / max(1, cost.get("seeds_in_job", 1)))


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
    return {
        "experiment": experiment,
        "spec": spec,
        "key": experiment.key,
        "absent_at": [name for name in TIERS if name not in experiment.tiers()],
        "judged": [(claim, judged.get(claim.id)) for claim in spec.claims],
        "cells": [_arm(spec.variants[variant].label, of_arm, read) for (variant, _), of_arm in arms.items()],
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
        "target_command": f"snakemake --cores 2 {experiment.key}" + ("" if tier == "ci" else f" --config tier={tier}"),
        "figure_command": f"dynarep figure --experiment {spec.id} --tier {tier}",
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
    tasks = ", ".join(dict.fromkeys(job.task for job in jobs))
    panels = "; ".join(f"{panel.label} ({panel.kind})" for panel in spec.panels)
    arms = ", ".join(spec.variants[name].label for name in dict.fromkeys(job.variant for job in jobs))
    shows = f"A cell per task and arm: {spec.table.label}" if spec.table else f"Panels from top to bottom: {panels}"
    return (
        f"{'Table' if spec.table else 'Figure'} {spec.id} at the {tier} tier: {spec.title} {shows}. "
        f"Tasks: {tasks}. Arms: {arms}. The caption follows; the CSV holds every number."
    )


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


# -- how it was made ----------------------------------------------------------------------------------------------


def _made(runs: Sequence[records.RunRecord]) -> dict[str, Any]:
    """Return what the runs say of themselves, each value with its number of runs: a mixture is visible."""
    facts: dict[str, Counter[str]] = {}
    manifests = [run.manifest for run in runs]
    parts = {part: {key: None for m in manifests for key in m.get(part, {})} for part in ("machine", "versions")}
    for m in manifests:
        code, config = m["code"], m["config"]
        state = {True: ", with uncommitted changes", False: ""}.get(code.get("dirty"), ", state unknown")
        said = {
            "git commit": f"{code['commit']}{state}" if code.get("commit") else None,
            f"code of {config['agent']['name']} with {config['protocol']['name']}": code["fingerprint"],
            "lock": m["lock"] or "none",
            "random streams": m.get("streams"),
            "dynarep": m.get("dynarep"),
            **{f"machine: {key}": m.get("machine", {}).get(key) for key in parts["machine"]},
            **{key: m.get("versions", {}).get(key) for key in parts["versions"]},
        }
        for name, value in said.items():
            facts.setdefault(name, Counter())["not recorded" if value is None else plain(value)] += 1
    written = sorted(str(run.manifest.get("written", "not recorded")) for run in runs)
    return {
        "runs": len(runs),
        "facts": [(name, values.most_common()) for name, values in facts.items()],
        "mixed": [name for name, values in facts.items() if len(values) > 1],
        "core_hours": sum(cpu_seconds(run.manifest) for run in runs) / 3600,
        "resumed": sum(bool(run.manifest.get("resumed")) for run in runs),
        "written": [text.replace("T", " ").replace("+00:00", " UTC") for text in written[:1] + written[-1:]],
    }
