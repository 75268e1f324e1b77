"""Figures, verdicts and the report: made again from the runs, and compared byte by byte.

Images are drawn from the CSV that follows from the runs, never from one that was found: nothing untrusted is drawn.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dynarep import untrusted
from dynarep.audit.findings import Audit
from dynarep.audit.places import Place, Plan
from dynarep.audit.runs import Runs
from dynarep.errors import UserError
from dynarep.experiment import Experiment

Report = Callable[[int, int], None]


def figures(
    place: Place, plan: Plan, runs: Runs, experiments: Sequence[Experiment], audit: Audit, report: Report
) -> None:
    """Check the four files of every figure that there should be."""
    if place.figures is None:
        audit.skip("figures: there are none beside these runs")
        return
    by_key = {experiment.key: experiment for experiment in experiments}
    shown = [(by_key[key], tier) for key, tier in plan.of if (key, tier) in runs.shown]
    for done, (experiment, tier) in enumerate(shown):
        report(done, len(shown))
        if any(folder in runs.bad for folder in plan.of[experiment.key, tier]):
            audit.skip(f"figure {experiment.key} at tier {tier}: some of its runs cannot be believed")
            continue
        _figure(place, experiment, tier, audit)
    report(len(shown), len(shown))


def _figure(place: Place, experiment: Experiment, tier: str, audit: Audit) -> None:
    from dynarep import figures as drawing  # matplotlib, pandas

    assert place.figures is not None
    stem = place.figures / tier / experiment.spec.paper / experiment.spec.id
    files = {kind: _content(place, stem.with_suffix(f".{kind}"), audit) for kind in ("csv", *drawing.FORMATS)}
    if not any(content is not None for content in files.values()):
        return
    csv = place.name(stem.with_suffix(".csv"))
    try:
        table = drawing.to_csv(drawing.table(experiment, tier, place.runs))
    except UserError as error:
        audit.skip(f"figure {experiment.key} at tier {tier}: {error}")
        return
    except Exception as error:  # numbers from elsewhere may be any
        audit.find(csv, "figure", f"cannot be made from these runs: {error!r:.200}")
        return
    if files["csv"] is not None:
        audit.checked["figures"] += 1
        if files["csv"] != table:
            audit.find(csv, "figure", _differs(files["csv"], table))
    images = {kind: content for kind, content in files.items() if kind != "csv" and content is not None}
    try:
        drawn = draw(experiment, tier, table) if images else {}
    except Exception as error:
        audit.find(csv, "image", f"cannot be drawn: {error!r:.200}")
        return
    for kind, content in images.items():
        audit.checked["images"] += 1
        if content != drawn[kind]:
            message = "is not what its CSV draws" + _other_matplotlib(files["svg"])
            audit.find(place.name(stem.with_suffix(f".{kind}")), "image", message)


def draw(experiment: Experiment, tier: str, csv: bytes) -> dict[str, bytes]:
    """Draw a figure from its CSV: format -> file content."""
    import pandas as pd

    from dynarep import figures as drawing

    data = pd.read_csv(io.BytesIO(csv))
    return drawing.draw(experiment, tier, data, drawing.note(experiment, tier, data))


def _content(place: Place, path: Path, audit: Audit, most: int = untrusted.PRODUCT_BYTES) -> bytes | None:
    """Return a product's content; a finding if it is not there or cannot be believed."""
    try:
        if link := untrusted.linked(path.parent, len(path.parent.relative_to(place.root).parts)):
            raise untrusted.UntrustedError("link", f"{link.name} is a link; it is not followed")
        return untrusted.read_bytes(path, most)
    except FileNotFoundError:
        audit.find(place.name(path), "missing", "is not there")
    except untrusted.UntrustedError as error:
        audit.find(place.name(path), error.kind, str(error))
    return None


def _differs(found: bytes, made: bytes) -> str:
    """Say where a CSV differs from the one that the runs make."""
    theirs, ours = found.split(b"\n"), made.split(b"\n")
    line = next(
        (n for n, (a, b) in enumerate(zip(theirs, ours, strict=False), 1) if a != b), min(map(len, (theirs, ours)))
    )
    said = theirs[line - 1][:80].decode(errors="replace")
    return f"does not follow from the runs: line {line} of {len(ours) - 1} is '{said}'; it has {len(theirs) - 1} lines"


def _other_matplotlib(svg: bytes | None) -> str:
    """Say which version of matplotlib drew an image, if it was another one: then bytes may differ for that."""
    import matplotlib as mpl

    found = re.search(rb"Matplotlib v([0-9][0-9a-z.]{0,20})", (svg or b"")[:4000])
    theirs = found[1].decode() if found else "an unknown version of matplotlib"
    return "" if theirs == mpl.__version__ else f"; drawn by {theirs}, here is {mpl.__version__}: it may be that alone"


# -- verdicts and report ------------------------------------------------------------------------------------------


def pages(place: Place, tier: str, whole: Sequence[str], experiments: Sequence[Experiment], audit: Audit) -> None:
    """Check the verdicts and the report of a tier; if it has one of them, it must have both."""
    if tier not in whole:
        audit.skip(f"verdicts and report of tier {tier}: there are none")
        return
    from dynarep import claims, report

    path = place.verdicts(tier)
    try:
        verdicts = claims.judge_all(experiments, tier, place.runs)
    except Exception as error:  # numbers from elsewhere may be any
        audit.find(place.name(path), "verdict", f"cannot be judged from these runs: {error!r:.200}")
        return
    if (content := _content(place, path, audit, untrusted.VERDICTS_BYTES)) is not None:
        audit.checked["verdicts"] += len(verdicts)
        made = [verdict.data() for verdict in verdicts]
        if content != (json.dumps(made, indent=1) + "\n").encode():
            audit.find(place.name(path), "verdict", _other_verdicts(content, json.loads(json.dumps(made))))
    path = place.report(tier)
    if (content := _content(place, path, audit)) is None:
        return
    kinds = ("link", "size", "malformed")
    unsafe = any(finding.kind in kinds and finding.path.startswith("figures/") for finding in audit.findings)
    if place.figures is None or unsafe:
        audit.skip(f"report of tier {tier}: the figures in it are not here, or cannot be read")
        return
    audit.checked["reports"] += 1
    try:
        page = report.build(experiments, tier, verdicts, place.runs, place.figures, path).encode()
    except Exception as error:
        audit.find(place.name(path), "report", f"cannot be made from these runs and figures: {error!r:.200}")
        return
    if content != page:
        theirs, ours = content.split(b"\n"), page.split(b"\n")
        lines = sum(a != b for a, b in zip(theirs, ours, strict=False)) + abs(len(theirs) - len(ours))
        audit.find(place.name(path), "report", f"does not follow from runs, figures and verdicts: {lines} lines differ")


def _other_verdicts(content: bytes, made: list[dict[str, Any]]) -> str:
    """Say which verdicts differ, and in what."""
    try:
        found = untrusted.parse_json(content)
        rows = {str(row["claim"]): row for row in found}
    except (untrusted.UntrustedError, TypeError, KeyError):
        return "is not a list of verdicts"
    ours = {row["claim"]: row for row in made}
    words = []
    for claim in [*ours, *(name for name in rows if name not in ours)]:
        a, b = rows.get(claim), ours.get(claim)
        if a is None or b is None:
            words.append(f"{claim} is {'missing' if a is None else 'no claim'}")
        elif keys := [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]:
            words.append(f"{claim} differs in {', '.join(keys)}")
    if not words:
        return "has the same verdicts in another order or form"
    return f"does not follow from the runs: {'; '.join(words[:5])}" + (
        f"; and {len(words) - 5} more" * (len(words) > 5)
    )
