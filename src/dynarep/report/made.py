"""How the runs of a report were made, as their manifests say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dynarep import records
from dynarep.experiment import plain

WATTS = 10.0  # ours, assumed: of a busy core with its share of memory, power supply and cooling; servers draw 5 to 20


def cpu_seconds(manifest: Mapping[str, Any]) -> float:
    """Return a run's share of its job's CPU seconds, those before a resume included."""
    cost = manifest.get("cost", {})
    spent = cost.get("cpu_s", 0.0) + sum(stop.get("cpu_s", 0.0) for stop in manifest.get("resumed", []))
    return float(spent / max(1, cost.get("seeds_in_job", 1)))


def _place(name: str) -> int:
    """Put the fingerprints of all agents' code together, after the commit."""
    return 0 if name == "git commit" else 1 if name.startswith("code of ") else 2


def facts_of(runs: Sequence[records.RunRecord]) -> dict[str, Any]:
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
    core_hours = sum(map(cpu_seconds, manifests)) / 3600
    written = sorted(str(run.manifest.get("written", "not recorded")) for run in runs)
    return {
        "runs": len(runs),
        "facts": [(name, facts[name].most_common()) for name in sorted(facts, key=_place)],
        "mixed": [name for name, values in facts.items() if len(values) > 1],
        "core_hours": core_hours,
        "kwh": core_hours * WATTS / 1000,
        "accelerated": sum(m.get("machine", {}).get("device", "cpu") != "cpu" for m in manifests),
        "peak_mib": max((m.get("cost", {}).get("peak_mib", 0) for m in manifests), default=0),
        "resumed": sum(bool(run.manifest.get("resumed")) for run in runs),
        "written": [text.replace("T", " ").replace("+00:00", " UTC") for text in written[:1] + written[-1:]],
    }
