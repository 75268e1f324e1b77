"""Compiled updates: the whole of what is differentiated is one graph per shape, and learns what the eager one does."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from dynarep import process
from dynarep.agents.bro import BRO
from dynarep.agents.ensemble import Ensemble
from dynarep.agents.mad_td import MadTD
from dynarep.agents.sac import SAC
from dynarep.configs.bro import BROConfig
from dynarep.configs.mad_td import MadTDConfig
from dynarep.configs.mbpo import EnsembleConfig
from dynarep.configs.sac import SACConfig
from dynarep.replay import normal
from dynarep.streams import stream

SEEDS, ROWS = [0, 1], 32


def batch(step: int) -> dict[str, torch.Tensor]:
    g = stream(0, "test data", step)
    shapes = {"obs": (5,), "action": (2,), "reward": (), "next_obs": (5,)}
    drawn = {name: g.standard_normal((len(SEEDS), ROWS, *shape), np.float32) for name, shape in shapes.items()}
    rows = {name: torch.from_numpy(values) for name, values in drawn.items()}
    return rows | {"action": rows["action"].tanh(), "mask": (rows["reward"] < 1.0).float()}


class Learner:
    """One agent and one of its updates, told by the step's number alone."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name == "sac":
            self.agent = SAC(SACConfig(width=16, batch_size=ROWS), 5, 2, SEEDS)
        elif name == "bro":
            config = BROConfig(critic_width=16, actor_width=16, quantiles=8, batch_size=ROWS)
            self.agent = BRO(config, 5, 2, SEEDS)
        elif name == "ensemble":
            self.agent = Ensemble(EnsembleConfig(model_width=16, model_batch_size=ROWS), 5, 2, SEEDS)
        else:
            self.agent = MadTD(MadTDConfig(width=16, batch_size=ROWS, bins=21), 5, 2, SEEDS)

    def learn(self, step: int) -> dict[str, torch.Tensor]:
        rows = batch(step)
        if self.name == "sac":
            return self.agent.update(rows, self.agent.noise([stream(s, "noise", step) for s in SEEDS]), step % 2 == 0)
        if self.name == "bro":
            noise = normal([stream(s, "noise", step) for s in SEEDS], (3, ROWS, 2)).unbind(1)
            return self.agent.update(rows, noise, step % 2 == 0)
        if self.name == "ensemble":
            return self.agent.update(rows, step % 2 == 0)
        return self.agent.update({key: values.unsqueeze(1) for key, values in rows.items()})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "graphs"), [("sac", 2), ("bro", 3), ("ensemble", 1), ("mad_td", 3)])
def test_what_is_differentiated_is_whole_graphs_for_good_and_learns_what_the_eager_one_does(name, graphs, monkeypatch):
    """Traced and differently ordered as for the compiler, which itself is left out: it would take half a minute."""
    eager = Learner(name)
    made = []

    def traced(function):
        made.append(function)
        return torch.compile(function, dynamic=False, fullgraph=True, backend="aot_eager_decomp_partition")

    monkeypatch.setattr(process, "fused", traced)
    torch._dynamo.reset()
    compiled = Learner(name)
    assert len(made) == graphs
    for step in range(5):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            ours = compiled.learn(step)
        theirs = eager.learn(step)
    assert ours.keys() == theirs.keys()
    assert ours
    for key, value in (eager.agent.state() | theirs).items():
        torch.testing.assert_close((compiled.agent.state() | ours)[key], value, rtol=1e-4, atol=1e-5, msg=key)
    start = Learner(name).agent.state()
    assert any(not torch.equal(value, start[key]) for key, value in compiled.agent.state().items())
    torch._dynamo.reset()


ALONE = """
import sys
from tests.test_compiled import Learner
from dynarep import process
import torch
process.settle(compiled=True)
learner = Learner("ensemble")
first = 0
if len(sys.argv) > 2:
    learner.agent.load(torch.load(sys.argv[2], weights_only=True))
    first = 2
for step in range(first, 4):
    learner.learn(step)
    if step == 1:
        torch.save(learner.agent.state(), sys.argv[1] + ".half")
torch.save(learner.agent.state(), sys.argv[1])
"""


@pytest.mark.slow
def test_a_compiled_process_that_goes_on_where_another_stood_ends_with_the_same_bytes(tmp_path):
    pytest.importorskip("torch._inductor")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for arguments in ([whole], [resumed, f"{whole}.half"]):
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", ALONE, *map(str, arguments)], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    ours, theirs = (torch.load(path, weights_only=True) for path in (whole, resumed))
    assert [key for key, value in ours.items() if not torch.equal(value, theirs[key])] == []
