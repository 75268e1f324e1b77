"""The frozen protocol: a small fixed buffer, then many updates without new data. Ours (design section 5).

    collect N + H transitions of a random policy; H of them, drawn at random, are held out
    repeat U / K times:  the agent learns from the N as in one agent step of K updates                 `advance`
    at stated updates:   critic and model on training, held-out and on-policy transitions; episodes    `measure`

It is a proxy for a high update ratio, cheap enough for a laptop: the policy moves, the data do not. On-policy
transitions have the simulator's true reward and next observation, at the held-out states (`mad-td` 4.2). As online,
the newest transition is not learned from (`mad-td` 3.10): here always the same one.

Divergence is a result. A seed is `diverged` from the first number that is not finite on, and while its mean value at
on-policy transitions exceeds all that the task's rewards allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynarep import envs
from dynarep.agents.mad_td import MadTD
from dynarep.configs import AgentConfig, EnvironmentConfig, ProtocolConfig
from dynarep.configs.frozen import FrozenConfig
from dynarep.configs.mad_td import MadTDConfig
from dynarep.configs.online import asks_simulator
from dynarep.protocols import Metrics, Protocol
from dynarep.protocols.collect import with_states
from dynarep.protocols.evaluation import Evaluator, ceiling, critic_along, critic_on, returns_of
from dynarep.protocols.snapshots import Simulator
from dynarep.replay import Part, Replay
from dynarep.streams import stream

BLOCK = 64  # agent steps of one `advance`


class Frozen(Protocol):
    """MAD-TD on a fixed buffer."""

    def __init__(
        self, environment: EnvironmentConfig, agent: AgentConfig, protocol: ProtocolConfig, seeds: Sequence[int]
    ) -> None:
        assert isinstance(agent, MadTDConfig)
        assert isinstance(protocol, FrozenConfig)
        self.config, self.seeds = protocol, list(seeds)
        self.metrics = Metrics(self.seeds)
        ratio = agent.updates_per_step
        self._milestones = sorted({-(-at // ratio) * ratio for at in (*protocol.measure_at, protocol.updates)})
        self.total = self._milestones[-1]
        self.diverged = np.zeros(len(self.seeds), bool)
        self.evaluator = Evaluator(environment, self.seeds, self.diverged) if protocol.eval_episodes else None
        self._collect(environment, asks_simulator(agent))
        self.agent = MadTD(agent, self.env.obs_size, self.env.action_size, self.seeds)
        self._ceiling = ceiling(environment, agent.discount)

    def _collect(self, environment: EnvironmentConfig, simulates: bool) -> None:
        """Fill the replay, split it, and keep the simulator's states: of all rows if it is the model (`simulates`)."""
        c, n = self.config, self.config.transitions + self.config.held_out
        self.env = env = envs.from_config(environment)
        collected = with_states(environment, tuple(self.seeds), n)
        fields = {"obs": (env.obs_size,), "action": (env.action_size,), "reward": (), "next_obs": (env.obs_size,)}
        self.replay = Replay({**fields, "mask": ()}, len(self.seeds), n)
        rows = {name: np.stack([getattr(data, name) for data in collected]) for name in fields}
        mask = np.stack([1.0 - data.ended for data in collected])  # 0 at an end of either kind (`mad-td` 3.7)
        self.replay.add({**rows, "mask": mask})

        held = np.zeros((len(self.seeds), n), bool)
        for own, seed in zip(held, self.seeds, strict=True):
            own[stream(seed, "held out").permutation(n)[: c.held_out]] = True
        self.training = Part(self.replay, [np.flatnonzero(~own) for own in held])
        self.held = Part(self.replay, [np.flatnonzero(own) for own in held])
        starts = [[0, *(np.flatnonzero(data.ended) + 1).tolist()] for data in collected]
        wanted = np.ones_like(held) if simulates else held
        self.simulator = Simulator([env], self.seeds, self.replay, starts, wanted, self.diverged)
        for states, own, data in zip(self.simulator.states, wanted, collected, strict=True):
            states |= {int(row): data.snapshots[row] for row in np.flatnonzero(own)}
        self._simulate = self.simulator.simulate if simulates else None

    def advance(self) -> dict[str, float]:
        """Learn up to the end of a block of agent steps or to the next measurement, whichever comes first."""
        ratio = self.agent.config.updates_per_step
        if self.done == 0 and not self.metrics.rows[0]:
            self.measure()
        step = self.done // ratio
        stop = min(next(m for m in self._milestones if m > self.done) // ratio, (step // BLOCK + 1) * BLOCK)
        for i in range(step, stop):
            self.agent.learn(self.training, i, self._simulate)
        self.done = stop * ratio
        if self.done in self._milestones:
            self.measure()
        return {
            "on-policy TD error": float(np.median(self.metrics.latest("td_rms/on_policy"))),
            "held-out": float(np.median(self.metrics.latest("td_rms/validation"))),
        }

    def measure(self) -> None:
        """Record critic and model on all kinds of transitions.

        What costs more only at the end: the policy's return with the critic beside it, and the critic's sharpness.
        """
        c, agent, at = self.config, self.agent, self.done
        sharpness_rows = c.sharpness_rows if at == self.total else 0
        measured = critic_on(
            agent, self.training, self.held, self.simulator.simulate, self.seeds, at, c.held_out, sharpness_rows
        )
        found = {metric: values.tolist() for metric, values in measured.items()}
        agent_step = c.transitions + c.held_out
        frame = agent_step * self.env.action_repeat
        if self.evaluator and at == self.total:
            played = self.evaluator.play(agent, c.eval_episodes, at)
            along = critic_along(agent, played, c.horizon_margin, self._ceiling)
            self.diverged |= np.array(along.pop("finite")) == 0
            found |= {**returns_of(played, self.env.units.reward), **along}
        q = np.array(found["q/on_policy"])
        self.diverged |= ~np.isfinite(q)
        found["diverged"] = (self.diverged | (q > self._ceiling)).astype(float).tolist()
        self.metrics.add(agent_step, frame, at, found)

    def state(self) -> dict[str, Any]:
        """Return the agent and what diverged: the data are collected again, to the same bytes, from the seeds."""
        return {"agent": self.agent.state(), "diverged": self.diverged.tolist()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the agent."""
        self.agent.load(state["agent"])
        self.diverged[:] = state["diverged"]
