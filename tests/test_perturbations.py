"""What must not change a byte of any run: where, when and in which order it is trained, and with whom."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import synthetic
from dynarep import run
from test_run import metrics

SMALL_MODEL = {"retrain_every": 16, "rollouts_per_step": 32, "model_chunks": 1, "chunk_steps": 4}
TINY: dict[str, Any] = {  # an arm of each kind of agent, a second each, on a task whose episodes end early
    "variants": {
        "sac": {"label": "SAC", "algorithm": "sac", "agent": {"updates_per_step": 1}},
        "ftfl": {
            "label": "FTFL",
            "agent": {"target": "direct", "normalise_targets": True, "updates_per_step": 1, **SMALL_MODEL},
        },
        "mad_td": {"label": "MAD-TD", "algorithm": "mad_td", "agent": {"updates_per_step": 1}},
    },
    "runs": {
        "small": {
            **{"agent": "mbpo", "protocol": "online", "why": "a trial"},
            "budget": {
                "smoke": [
                    {
                        **{"tasks": ["Hopper-v5"], "width": 16, "batch_size": 32, "steps": 80, "random_steps": 60},
                        **{"model_width": 16, "model_batch_size": 32, "holdout_draws": 64},
                        **{"eval_every": 40, "eval_episodes": 1},
                    }
                ]
            },
        }
    },
    "figure": {"panels": [{"kind": "final", "metrics": {"return/final": "return"}, "label": "final return"}]},
    "claims": [],
}
WORLDS: dict[str, dict[str, str]] = {
    "another folder, home and time zone": {"HOME": "/nonexistent", "TZ": "Pacific/Kiritimati"},
    "another locale and order of hashes": {
        **{"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},  # ASCII: no text is read by default
        "PYTHONHASHSEED": "4711",
    },
    "another order, each seed alone, more threads": {"OMP_NUM_THREADS": "7", "MKL_NUM_THREADS": "7"},
}


def train(home: Path, results: Path, places: list[str], world: Mapping[str, str]) -> None:
    """Train in a process of its own: hashes, locale and libraries are fixed when it starts."""
    command = [sys.executable, "-m", "dynarep", "train", "--tier", "smoke", "--results", str(results)]
    command += [word for place in places for word in ("--job", place)]
    env = {**os.environ, "DYNAREP_HOME": str(home), **world}
    done = subprocess.run(command, cwd=results.parent, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_same_bytes_in_every_world(tmp_path, new_home):
    """Each world changes several things at once, because every process costs seconds; all are expected to be none."""
    jobs = synthetic.trial(new_home, **TINY).jobs("smoke")
    assert {job.config.agent.name for job in jobs} == {"mad_td", "sac", "mbpo"}
    for job in jobs:
        run.train(job, tmp_path / "here")
    for number, (name, world) in enumerate(WORLDS.items()):
        results = tmp_path / f"world{number}" / "runs"
        results.parent.mkdir()
        seeds = ["1", "0"] if "alone" in name else ["0-1"]
        places = [f"{j.experiment}/{j.group}/{j.variant}/{j.task}/{block}" for j in jobs for block in seeds]
        train(new_home, results, places[::-1] if "order," in name else places, world)
        for job in jobs:
            assert metrics(results, job) == metrics(tmp_path / "here", job), f"{name}: {job.key()}"
