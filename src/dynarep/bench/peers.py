"""Updates of SAC as others wrote it, stable-baselines3's (PyTorch) and SBX's (JAX), and ours, on the same sizes.

What a call does is the same for all: `UPDATES` updates with `UPDATES` minibatches of 256 transitions that lie ready,
each of both critics, their moving average, the actor and the temperature, noise and Adam included. Sampling from a
replay buffer is left out everywhere, and so is output: loggers have nowhere to write to. Networks are 2 x 256 ReLU
everywhere; `parameters` lets that be checked.

What is theirs: SB3 reads every loss as a number, its actor's loss also goes back to the critics' parameters, and the
actor is evaluated on both observations apart; SBX makes all updates of a call in one compiled program, which ours, if
compiled, does not. Their temperature aims at -|A|, ours at -|A| / 2.

Only what a process is asked for is imported there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from dynarep.agents.sac import SAC
from dynarep.bench.kernels import ACTION, OBS, transitions
from dynarep.configs.sac import SACConfig

UPDATES, BATCH, WIDTH = 20, 256, 256
PACKAGES = {"sb3": "stable-baselines3", "sbx": "sbx-rl"}  # as PyPI names them


@dataclass(frozen=True)
class Learner:
    """A SAC: `call` makes `UPDATES` updates, `made` says how many it ever made."""

    name: str
    call: Callable[[], object]
    made: Callable[[], int]
    parameters: int  # trained numbers of actor and critics


def ours() -> Learner:
    """Return our own for one seed, eager or compiled as the process was settled."""
    agent = SAC(SACConfig(width=WIDTH, batch_size=BATCH), OBS, ACTION, [0])
    rows = transitions(1, UPDATES * BATCH)
    batches = [{name: v[:, i : i + BATCH] for name, v in rows.items()} for i in _starts()]
    nets = agent.actor, agent.critic
    count = sum(net.members * int(np.prod(shape)) for net in nets for shape in net.slots().values())
    step = itertools.count()

    def made() -> int:
        return int(agent.state()["adam/critic/steps"])

    return Learner("dynarep", lambda: agent.updates(batches, next(step)), made, count)


def sb3() -> Learner:
    """Return stable-baselines3's."""
    import stable_baselines3
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    model = _model(stable_baselines3.SAC)
    rows = _flat(ReplayBufferSamples, UPDATES * BATCH)
    batches = [ReplayBufferSamples(*(None if v is None else v[i : i + BATCH] for v in rows)) for i in _starts()]
    turn = itertools.cycle(batches)
    model.replay_buffer.sample = lambda size, env=None: next(turn)
    count = sum(p.numel() for net in (model.actor, model.critic) for p in net.parameters())
    return Learner(_named("sb3"), lambda: model.train(UPDATES, BATCH), lambda: model._n_updates, count)


def sbx() -> Learner:
    """Return SBX's, all `UPDATES` updates in one compiled program, as it does it."""
    import jax
    import sbx as package
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    model, rows = _model(package.SAC), _flat(ReplayBufferSamples, UPDATES * BATCH)
    model.replay_buffer.sample = lambda size, env=None: rows

    def call() -> None:
        model.train(UPDATES, BATCH)
        jax.block_until_ready(model.policy.actor_state.params)

    trained = model.policy.actor_state.params, model.policy.qf_state.params
    count = sum(leaf.size for leaf in jax.tree_util.tree_leaves(trained))
    return Learner(f"{_named('sbx')}, jax {version('jax')}", call, lambda: model._n_updates, count)


LEARNERS: dict[str, Callable[[], Learner]] = {"ours": ours, "sb3": sb3, "sbx": sbx}


def _named(peer: str) -> str:
    return f"{PACKAGES[peer]} {version(PACKAGES[peer])}"


def _starts() -> range:
    return range(0, UPDATES * BATCH, BATCH)


def _flat(samples: Any, count: int) -> Any:
    """Transitions as their replay buffers hand them out; ends are 1 - mask."""
    rows = {name: v[0] for name, v in transitions(1, count).items()}
    reward, end = rows["reward"].unsqueeze(1), 1.0 - rows["mask"].unsqueeze(1)
    return samples(rows["obs"], rows["action"], rows["next_obs"], end, reward)


def _model(algorithm: Any) -> Any:
    """Return their algorithm at these sizes, all else at its defaults, for an environment of humanoid's."""
    import gymnasium
    from stable_baselines3.common.logger import Logger

    class Sized(gymnasium.Env):  # type: ignore[misc]
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
        action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION,), np.float32)

    torch.set_num_threads(1)
    sizes = {"batch_size": BATCH, "policy_kwargs": {"net_arch": [WIDTH, WIDTH]}, "buffer_size": 1}
    model = algorithm("MlpPolicy", Sized(), device="cpu", ent_coef="auto", seed=0, **sizes)
    model.set_logger(Logger(None, []))
    return model
