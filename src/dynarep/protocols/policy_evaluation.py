"""The policy-evaluation protocol: what a critic makes of synthetic transitions when no policy learns. Ours.

    collect N transitions of the uniform random policy; a share of them is never trained on
    fit the ensemble to the rest, in MBPO's chunks                                                              `_fit`
    U times:  B start states from the rest; of most of them a uniform action and what the model makes of it,
              of the others the stored action and what really followed                                         `batch`
              y = r + gamma m min_j Qbar_j(s', a'),  a' uniform;  one Adam step on both critics;  Qbar follows  `learn`
    at stated updates:  Q along the logged episodes against their discounted returns                         `measure`

FTFL's second cause without the loop around it: policy, data and entropy stay out, so the critic has one right answer,
the value of the random policy, and the logged returns are samples of it (`ftfl` 4.4). Without synthetic rows no model
is fitted; two thousand updates do not suffice to reach the answer: compare with that arm, not with the return itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynarep.agents.mbpo import MBPO
from dynarep.configs import AgentConfig, EnvironmentConfig, ProtocolConfig
from dynarep.configs.mbpo import MBPOConfig
from dynarep.configs.policy_evaluation import PolicyEvaluationConfig
from dynarep.diagnostics.critic import Episode, returns_to_go, values
from dynarep.diagnostics.model import report
from dynarep.nets import EVEN
from dynarep.optimisers import Adam
from dynarep.placement import here
from dynarep.protocols import Metrics, Protocol
from dynarep.protocols.collect import Transitions, collect
from dynarep.replay import Replay, draw
from dynarep.streams import stream
from dynarep.terminations import termination

BLOCK = 50  # critic updates of one `advance`
FIELDS = ("obs", "action", "reward", "next_obs")
OF_THE_MODEL = ("reward/nmse", "inflation/share")


class PolicyEvaluation(Protocol):
    """Learn the value of the uniform random policy from a fixed data set and a model of it.

    Raises:
        ValueError: the agent's synthetic transitions are not single steps of its model.
    """

    def __init__(
        self, environment: EnvironmentConfig, agent: AgentConfig, protocol: ProtocolConfig, seeds: Sequence[int]
    ) -> None:
        assert isinstance(agent, MBPOConfig)
        assert isinstance(protocol, PolicyEvaluationConfig)
        if agent.rollouts != "model" or agent.horizon() != 1 or agent.selection != "none":
            raise ValueError("policy_evaluation takes single steps of the model: drop rollouts, horizons, selection")
        self.config, self.seeds, self.repeat = protocol, list(seeds), environment.action_repeat
        self._collect(environment, agent.discount)
        obs_size, action_size = (self.replay.data[name].shape[-1] for name in ("obs", "action"))
        self.agent = MBPO(agent, obs_size, action_size, self.seeds, environment.task)
        self._ends = termination(environment.task, agent.terminations)
        self.sac, self.ensemble = self.agent.sac, self.agent.ensemble
        for net in (self.sac.critic, self.sac.target):
            net.parameter(f"/{agent.hidden_layers}.kernel").mul_(protocol.small_head)
        self._adam = Adam(self.sac.critic, agent.lr)
        self._fits = protocol.model_updates if agent.learns_a_model() else 0  # before the critics' updates
        self.metrics, self.total = Metrics(self.seeds), self._fits + protocol.updates
        self._milestones = sorted({*protocol.measure_at, protocol.updates})

    def _collect(self, environment: EnvironmentConfig, discount: float) -> None:
        """Fill the replay, keep transitions that nothing learns from, and the states whose return is known."""
        n = self.config.transitions
        judged = max(EVEN, int(n * self.config.evaluation) // EVEN * EVEN)
        kept: list[dict[str, np.ndarray]] = []
        held: list[dict[str, np.ndarray]] = []
        self._obs: list[np.ndarray] = []
        self._action: list[np.ndarray] = []
        self._mc: list[np.ndarray] = []
        for seed, data in zip(self.seeds, collect(environment, self.seeds, n), strict=True):
            order = stream(seed, "evaluation split").permutation(n)
            fields = {name: getattr(data, name) for name in FIELDS} | {"mask": 1.0 - data.terminated}
            kept.append({name: rows[np.sort(order[judged:])] for name, rows in fields.items()})
            held.append({name: fields[name][np.sort(order[:judged])] for name in FIELDS})
            episodes = _episodes(data)
            known = np.concatenate([episode.counts(self.config.margin) for episode in episodes])
            returns = np.concatenate([returns_to_go(episode.reward, discount) for episode in episodes])
            self._obs.append(data.obs[known])
            self._action.append(data.action[known])
            self._mc.append(returns[known])
        shapes = {name: rows.shape[1:] for name, rows in kept[0].items()}
        self.replay = Replay(shapes, len(self.seeds), n - judged)
        self.replay.add({name: np.stack([rows[name] for rows in kept]) for name in shapes})
        self.held = {name: here(np.stack([rows[name] for rows in held])) for name in FIELDS}

    def advance(self) -> dict[str, float]:
        """Fit the model for a chunk; or, once it is fitted, take some critic updates, up to the next measurement."""
        if self.done < self._fits:
            self._fit()
            return {}
        update = self.done - self._fits
        stop = min(update + BLOCK, next(at for at in self._milestones if at > update))
        for u in range(update, stop):
            self.learn(self.batch(u), u)
        self.done = self._fits + stop
        if stop in self._milestones:
            self.measure(stop)
        return {"|Q|": float(np.median(self.metrics.latest("q/abs")))} if stop >= self._milestones[0] else {}

    def _fit(self) -> None:
        """Fit one chunk, and judge the model after the last."""
        chunk = self.done // self.config.chunk
        steps = min(self.config.chunk, self._fits - self.done)
        self.ensemble.train_chunk(self.replay.data, self._streams("model chunk", chunk), steps)
        self.done += steps
        if self.done == self._fits:
            found = report(self.ensemble, self.held, self._streams("measure", 0))
            self._record(0, {name: found[name] for name in OF_THE_MODEL})

    def batch(self, u: int) -> dict[str, Tensor]:
        """Return the minibatch of update `u`, each field (S, B, ...): the model's transitions first, then real ones."""
        c = self.agent.config
        rows = self.replay.rows(draw(self._streams("replay", u), self.replay.size, (c.batch_size,)))
        size = c.synthetic_rows()
        if size:
            generators = self._streams("rollout", u)
            obs, action = rows["obs"][:, :size], self._uniform(generators, size)
            next_obs, reward = self.ensemble.sample(obs, action, generators)
            mask = (~self._ends(next_obs)).float()
            made = {"action": action, "reward": reward, "next_obs": next_obs, "mask": mask}
            for name, part in made.items():
                rows[name][:, :size] = part
        return rows

    def learn(self, rows: Mapping[str, Tensor], u: int) -> None:
        """Make update `u` of the critics, towards the value of the uniform random policy."""
        c, sac = self.agent.config, self.sac
        with torch.no_grad():
            following = self._uniform(self._streams("noise", u), c.batch_size)
            ahead = sac.values(sac.target, rows["next_obs"], following).amin(1)
            y = rows["reward"] + c.discount * rows["mask"] * ahead
        q = sac.values(sac.critic, rows["obs"], rows["action"])
        (q - y.unsqueeze(1)).square().mean(-1).sum().backward()  # type: ignore[no-untyped-call]
        self._adam.step()
        sac.target.follow(sac.critic, c.target_rate)

    def measure(self, update: int) -> None:
        """Record values at logged states and actions beside the discounted returns that followed there."""
        found: dict[str, list[float]] = {}
        for q, real in zip(values(self.agent, self._obs, self._action), self._mc, strict=True):
            for name, value in _compare(q.astype(np.float64), real).items():
                found.setdefault(name, []).append(value)
        self._record(update, found)

    def _uniform(self, generators: Sequence[np.random.Generator], size: int) -> Tensor:
        """Draw actions of the policy that is valued, (S, size, a)."""
        shape = (size, self.replay.data["action"].shape[-1])
        return here(np.stack([g.uniform(-1, 1, size=shape) for g in generators]).astype(np.float32))

    def _streams(self, purpose: str, number: int) -> list[np.random.Generator]:
        return [stream(seed, purpose, number) for seed in self.seeds]

    def _record(self, update: int, found: Mapping[str, Sequence[float]]) -> None:
        n = self.config.transitions
        self.metrics.add(n, n * self.repeat, update, found)

    def state(self) -> dict[str, Any]:
        """Return agent and optimiser: the data are collected again, to the same bytes, from the seeds."""
        return {"agent": self.agent.state(), "adam": self._adam.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore agent and optimiser."""
        self.agent.load(state["agent"])
        self._adam.load(state["adam"])


def _episodes(data: Transitions) -> list[Episode]:
    """Cut transitions into episodes; the last may be unfinished, as if a limit had ended it."""
    bounds = [0, *(np.flatnonzero(data.ended) + 1)]
    bounds += [len(data)] if bounds[-1] < len(data) else []
    pieces = [slice(start, end) for start, end in pairwise(bounds)]
    return [Episode(data.obs[p], data.action[p], data.reward[p], bool(data.terminated[p][-1])) for p in pieces]


def _compare(q: np.ndarray, mc: np.ndarray) -> dict[str, float]:
    """Compare values (n,) with returns (n,); NaN where there is nothing to compare or nothing varies."""
    diverged = float(not np.isfinite(q).all())
    if not len(q):
        names = ("q/mean", "q/abs", "q/mc", "q/correlation", "q/abs_over_mc")
        return dict.fromkeys(names, math.nan) | {"diverged": diverged}
    with np.errstate(invalid="ignore", over="ignore"):  # of values that diverged
        mean, size, usual = float(q.mean()), float(np.abs(q).mean()), float(np.abs(mc).mean())
        left, right = q - mean, mc - mc.mean()
        spread = float(np.sqrt((left**2).mean() * (right**2).mean()))
        correlation = float((left * right).mean()) / spread if spread else math.nan
    return {
        "q/mean": mean,
        "q/abs": size,
        "q/mc": float(mc.mean()),
        "q/correlation": correlation,
        "q/abs_over_mc": size / usual if usual else math.nan,
        "diverged": diverged,
    }
