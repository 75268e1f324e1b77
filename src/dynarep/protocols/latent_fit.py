"""The latent-fit protocol: one data set of real transitions, an aligned latent model fitted to it. Ours.

    collect N transitions of a random policy, in short episodes; some of the episodes are held out     `_collect`
    repeat:  one whole update of the agent on the others, actor and critics included                    `advance`
    at stated updates:  rewards, latents, KL and values on the episodes never seen                      `measure`

Level 1 of `extensions` A8: it isolates what the agent learns of fixed data from how it acts. No return is measured.

Divergence is a result: `diverged` says that the reward's error or the KL was not finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynarep.agents.alm import ALM
from dynarep.configs import AgentConfig, EnvironmentConfig, ProtocolConfig
from dynarep.configs.alm import ALMConfig
from dynarep.configs.latent_fit import LatentFitConfig
from dynarep.diagnostics import aligned
from dynarep.diagnostics.critic import Episode
from dynarep.envs import EnvError
from dynarep.nets import EVEN
from dynarep.placement import host
from dynarep.protocols import Metrics, Protocol
from dynarep.protocols.collect import FIELDS as STORED
from dynarep.protocols.collect import Transitions, collect
from dynarep.replay import Replay, spread
from dynarep.streams import stream

BLOCK = 50  # updates of one `advance`
SEQUENCES = 512  # ours: of held-out episodes, for what is measured along three steps
BATCHES = 8  # ours: minibatches whose gradients are looked at
FIELDS = ("obs", "action", "reward", "next_obs")


class LatentFit(Protocol):
    """Fit ALM to a fixed data set.

    Raises:
        EnvError: a task whose episodes may end before the limit that they are given.
    """

    def __init__(
        self, environment: EnvironmentConfig, agent: AgentConfig, protocol: ProtocolConfig, seeds: Sequence[int]
    ) -> None:
        assert isinstance(agent, ALMConfig)
        assert isinstance(protocol, LatentFitConfig)
        self.config, self.seeds, self.repeat = protocol, list(seeds), environment.action_repeat
        self.metrics, self.total = Metrics(self.seeds), protocol.updates
        self._milestones = sorted({*protocol.measure_at, protocol.updates})
        self._collect(environment)
        obs_size, action_size = (self.training.data[name].shape[-1] for name in ("obs", "action"))
        self.agent = ALM(agent, obs_size, action_size, self.seeds)
        self._clipped = torch.zeros_like(self.agent.reward_mean)  # updates of each seed since it was measured
        self._since = 0

    def _collect(self, environment: EnvironmentConfig) -> None:
        """Keep some of each seed's episodes from the agent; rows stay in the order of time within them."""
        c, (kept, held) = self.config, self.config.episodes()
        sides: list[list[Transitions]] = [[], []]
        for seed, data in zip(
            self.seeds, collect(environment, self.seeds, c.transitions, c.episode_steps), strict=True
        ):
            if data.ended.sum() > kept + held or data.terminated.any():
                what = f"{environment.task}: an episode ended before its {c.episode_steps} steps (seed {seed})"
                raise EnvError(
                    f"{what}; latent_fit wants as many rows from every one: take another task, or fewer steps"
                )
            order = stream(seed, "held-out episodes").permutation(kept + held)
            for side, chosen in zip(sides, (order[held:], order[:held]), strict=True):
                rows = (np.sort(chosen)[:, None] * c.episode_steps + np.arange(c.episode_steps)).ravel()
                side.append(Transitions(**{field: getattr(data, field)[rows] for field in STORED}))
        self.training, self.held = map(_replay, sides)
        self.episodes = [[_episode(own, k * c.episode_steps, c.episode_steps) for k in range(held)] for own in sides[1]]
        self.seen, self.unseen = self._rows(self.training, "seen rows"), self._rows(self.held, "judged rows")

    def _rows(self, replay: Replay, purpose: str) -> dict[str, Tensor]:
        """Return a replay's rows, all but a few: their number is even."""
        generators, count = [stream(seed, purpose) for seed in self.seeds], replay.size // EVEN * EVEN
        rows = replay.rows(spread(generators, replay.sizes.tolist(), max(EVEN, count)))
        return {name: rows[name] for name in FIELDS}

    def advance(self) -> dict[str, float]:
        """Learn up to the end of a block or to the next measurement, whichever comes first."""
        stop = min((self.done // BLOCK + 1) * BLOCK, next(at for at in self._milestones if at > self.done))
        for update in range(self.done, stop):
            terms = self.agent.learn(self.training, update)
            self._clipped += ~(terms["representation_grad_norm"] <= self.agent.config.clip)  # one not finite counts
            self._since += 1
        self.done = stop
        if stop in self._milestones:
            self.measure(terms)
        shown = {"reward error / variance": "reward/error", "KL": "kl/step"}
        measured = stop >= self._milestones[0]
        return {label: float(np.median(self.metrics.latest(name))) for label, name in shown.items()} if measured else {}

    def measure(self, terms: Mapping[str, Tensor]) -> None:
        """Record what is known of the episodes never seen; `terms` are the last update's.

        The sequences and the noise are the same every time, and for all arms.
        """
        agent = self.agent
        generators, held, seen = (
            [stream(seed, purpose) for seed in self.seeds]
            for purpose in ("measure", "judged sequences", "seen sequences")
        )
        sequences = agent.sequences(self.held, held, SEQUENCES)
        weight, std = terms["balance"], agent.std(self.done)
        found = aligned.report(agent, self.unseen, sequences, self.seen, generators, std, weight)
        batches = [agent.sequences(self.training, seen, agent.config.batch_size) for _ in range(BATCHES)]
        found |= aligned.gradients([agent.gradient_shares(batch, k) for k, batch in enumerate(batches)])
        found |= aligned.against_policy(agent, self.episodes)
        found["clip/share"] = host(self._clipped / self._since).tolist()
        finite = np.isfinite([found["reward/mse"], found["kl/step"]]).all(0)
        found["diverged"] = (~finite).astype(float).tolist()
        self._clipped, self._since = torch.zeros_like(self._clipped), 0
        n = self.config.transitions
        self.metrics.add(n, n * self.repeat, self.done, found)

    def state(self) -> dict[str, Any]:
        """Return the agent and what is counted: the data are collected again, to the same bytes, from the seeds."""
        return {"agent": self.agent.state(), "clipped": self._clipped.clone(), "since": self._since}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore agent and counts."""
        self.agent.load(state["agent"])
        self._clipped.copy_(state["clipped"])
        self._since = int(state["since"])


def _replay(collected: Sequence[Transitions]) -> Replay:
    """Put all seeds' rows into a replay, in their order."""
    rows = {name: np.stack([getattr(data, name) for data in collected]) for name in FIELDS}
    rows["mask"] = np.stack([1.0 - data.terminated for data in collected])
    replay = Replay({name: each.shape[2:] for name, each in rows.items()}, *rows["reward"].shape)
    replay.add(rows)
    return replay


def _episode(data: Transitions, start: int, steps: int) -> Episode:
    own = slice(start, start + steps)
    return Episode(data.obs[own], data.action[own], data.reward[own], terminated=False)
