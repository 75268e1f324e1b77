"""An experiment whose settings are pairs of arms: does a cheap fit foretell how much direct targets help?"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import synthetic
from dynarep.experiment import Experiment

SETTINGS = 6
FIT = {"transitions": 320, "updates": 20, "chunk": 10, "model_width": 16, "model_batch_size": 32, "holdout_draws": 64}
ONLINE = {"width": 16, "model_width": 8, "steps": 64, "random_steps": 32, "eval_every": 32, "eval_episodes": 1}
CLAIM: dict[str, Any] = {
    **{"id": "Z3", "says": "A bad fit foretells help.", "source": "a trial", "published": "nothing", "why": "any"},
    "contrast": {"kind": "rank", "predictor": "reward/nmse", "outcome": "return/final", "average": "geometric"},
    **{"direction": "greater", "no_effect": 0, "smallest": 0.5, "unit": "Spearman's rank correlation"},
    "tiers": {"ci": "reported"},
}
PANEL: dict[str, Any] = {
    **{"kind": "scatter", "metrics": {"reward/nmse": "reward error of a fit"}, "outcome": "return/final"},
    **{"label": "return, direct - residual", "average": "geometric", "x_scale": "log"},
}


def scale(k: int) -> float:
    """Return the unit of the reward of a setting."""
    return 2.0**-k


def form(settings: int = SETTINGS) -> dict[str, Any]:
    """Return the experiment: per setting a fit, and two agents trained online, on one task; two series."""
    variants: dict[str, Any] = {}
    for k in range(settings):
        common = {"environment": {"reward_scale": scale(k)}}
        variants[f"fit_{k}"] = {"label": f"fit {k}", **common}
        variants[f"residual_{k}"] = {"label": f"residual {k}", **common}
        variants[f"direct_{k}"] = {"label": f"direct {k}", "agent": {"target": "direct"}, **common}
    fits = [name for name in variants if name.startswith("fit")]
    agents = [name for name in variants if name not in fits]
    online = {"tasks": ["hopper-hop"], "seeds": 4, **ONLINE}
    runs = {
        "fits": {
            **{"agent": "ensemble", "protocol": "model_fit", "why": "cheap", "variants": fits},
            "budget": {"ci": [{"tasks": ["hopper-hop"], "seeds": 3, "first_seed": 0, **FIT}]},
        },
        "agents": {
            **{"agent": "mbpo", "protocol": "online", "why": "a trial", "variants": agents},
            "budget": {"ci": [{"first_seed": 7, **online}]},
        },
    }
    pairs = [
        {
            **{"label": f"reward x 1/{2**k}", "series": ("even", "odd")[k % 2]},
            **{"predictor": f"fit_{k}", "of": f"direct_{k}", "to": f"residual_{k}"},
        }
        for k in range(settings)
    ]
    return copy.deepcopy(
        {
            **{"id": "Y3", "variants": variants, "runs": runs, "pairs": pairs, "claims": [CLAIM]},
            "figure": {"panels": [PANEL]},
        }
    )


def load(home: Path, settings: int = SETTINGS, **changes: Any) -> Experiment:
    """Write the experiment below a home, with other values at its top level, and load it."""
    return synthetic.trial(home, **{**form(settings), **changes})


def help_by(effects: list[float], fits: list[float]) -> synthetic.Value:
    """Return runs of which direct targets help by so much on average, and fits of so much error."""

    def value(variant: str, task: str, seed: int, update: int, metric: str) -> float:
        kind, _, k = variant.partition("_")
        noise = (0.3, -0.5, 0.4, -0.2)[seed % 4]  # of the seeds 7 to 10 it sums to 0
        if kind == "fit":
            return fits[int(k)] * (1.5 ** (seed - 1))  # of the seeds 0 to 2 the geometric mean is the number
        return 10.0 + seed + (effects[int(k)] + noise if kind == "direct" else 0.0)

    return value
