"""Runs made of chosen numbers, so that verdicts and figures can be tested without training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynarep import fingerprint, records
from dynarep.experiment import Experiment, Job, load
from dynarep.files import checkout
from dynarep.protocols import Metrics

# (variant, task, seed, update, metric) -> value; None leaves it out
Value = Callable[[str, str, int, int, str], float | None]


def manifest(job: Job, seed: int) -> dict[str, object]:
    return {
        "identity": job.config.identity(),
        "config": job.config.content(),
        "seed": seed,
        "code": {
            "fingerprint": fingerprint.of_parts(job.config.agent, job.config.protocol),
            "commit": "c",
            "dirty": False,
        },
        "lock": fingerprint.of_lock(checkout()),
        "versions": {},
        "machine": {},
        "cost": {"cpu_s": 1.0, "wall_s": 1.0, "peak_mib": 1, "seeds_in_job": 1},
        "resumed": [],
    }


def write_runs(
    experiment: Experiment, tier: str, results: Path, value: Value, updates: tuple[int, ...] = (0, 8)
) -> None:
    """Write every run of a tier with the metrics its protocol declares."""
    for job in experiment.jobs(tier):
        for seed, folder in zip(job.seeds, job.folders(), strict=True):
            metrics = Metrics([seed])
            for update in updates:
                names = sorted(job.config.protocol.metrics)
                values = {name: value(job.variant, job.task, seed, update, name) for name in names}
                metrics.add(10 * update, 20 * update, update, {k: [v] for k, v in values.items() if v is not None})
            records.write(results / folder, metrics.csv(0), manifest(job, seed))


THEIRS = ["SAC, UTD 1", "MBPO"]
# An experiment with every kind of panel, arms of two agents, an arm on one task alone, and a claim of each kind.
TRIAL: dict[str, Any] = {
    "id": "Y1",
    "paper": "beyond",
    "title": "Does a trial show all that can be shown?",
    "reproduces": "nothing",
    "caption": "A trial.",
    "variants": {
        "sac": {"label": "SAC", "algorithm": "sac", "agent": {"updates_per_step": 1}},
        "little": {"label": "MBPO, little", "agent": {"synthetic_share": 0.05}, "dose": 0.05, "series": "MBPO"},
        "mbpo": {"label": "MBPO", "agent": {"synthetic_share": 0.95}, "dose": 0.95, "series": "MBPO"},
        "ftfl": {
            "label": "FTFL",
            "agent": {"target": "direct", "normalise_targets": True},
            "tasks": ["hopper-hop"],
            "dose": 0.95,
            "series": "FTFL",
        },
    },
    "runs": {
        "small": {
            "agent": "mbpo",
            "protocol": "online",
            "why": "a trial",
            "settings": {"agent": {"lr": 1e-3, "model_lr": 1e-3}},
            "budget": {
                "smoke": [
                    {
                        **{"tasks": ["hopper-hop", "Hopper-v5"], "seeds": 2, "width": 16, "model_width": 8},
                        **{"steps": 64, "random_steps": 32, "eval_every": 32, "eval_episodes": 1},
                    }
                ],
                "paper": [{"tasks": ["hopper-hop", "quadruped-walk", "Hopper-v5"], "seeds": 3, "seeds_per_job": 2}],
            },
        }
    },
    "figure": {
        "panels": [
            {"kind": "final", "metrics": {"return/final": "return"}, "label": "final return", "published": THEIRS},
            {
                **{"kind": "dose", "metrics": {"return/final": "return"}, "label": "final return"},
                **{"scale": "symlog", "linear_within": 0.5, "x_scale": "log", "x_label": "share of synthetic rows"},
            },
            {"kind": "curves", "metrics": {"reward/nmse": "error"}, "label": "reward error", "x": "agent_step"},
            {
                **{"kind": "curves", "metrics": {"critic/q": "Q", "critic/mc": "return"}, "label": "value"},
                **{"variants": ["sac", "mbpo"], "scale": "log"},
            },
        ]
    },
    "claims": [
        {
            **{"id": "Z1", "says": "FTFL beats SAC.", "source": "a trial", "published": "nothing", "why": "any"},
            "contrast": {
                "kind": "difference",
                "of": {"variant": "ftfl", "metric": "return/final", "worst": 0},
                "to": {"variant": "sac", "metric": "return/final", "worst": 0},
            },
            **{"direction": "greater", "no_effect": 0, "smallest": 0.1, "unit": "return"},
            "tiers": {"paper": "gated"},
        },
        {
            **{"id": "Z2", "empirical": False, "says": "Benchmarks matter.", "source": "a trial"},
            **{"published": "an argument", "why": "no run can judge it"},
        },
    ],
}
RETURNS = {"kind": "returns", "metric": "return/final", "label": "final return", "published": THEIRS}
DEFAULTS = {"kind": "hyperparameters", "agents": ["sac", "mbpo"], "protocols": ["online"]}


def trial(home: Path, **changes: Any) -> Experiment:
    """Write the trial below a home, with other values at its top level (None removes a key), and load it."""
    data = {key: value for key, value in {**TRIAL, **changes}.items() if value is not None}
    path = home / "experiments" / "beyond" / f"{data['id']}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return load(path)


def table(home: Path, form: dict[str, Any], **changes: Any) -> Experiment:
    """Write the trial with a table instead of its figure, and without claims."""
    runs = TRIAL["runs"] if form["kind"] == "returns" else {}
    return trial(home, **{"figure": None, "table": form, "runs": runs, "claims": [], **changes})
