"""The frozen protocol: a small fixed buffer, then many updates without new data. Ours (design section 5).

    collect N + H transitions of a random policy; H of them, drawn at random, are held out
    repeat U / K times:  the agent learns from K minibatches of the N (one agent step's learning at update ratio K)
    at stated updates:   critic error on training, held-out and on-policy transitions          `measure`

It is a proxy for a high update ratio, cheap enough for a laptop: the policy moves, the data do not. On-policy
transitions have the simulator's true reward and next observation, at the held-out states (`mad-td` 4.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynarep import envs
from dynarep.agents.mad_td import MadTD
from dynarep.configs import AgentConfig, EnvironmentConfig, ProtocolConfig
from dynarep.configs.frozen import FrozenConfig
from dynarep.configs.mad_td import MadTDConfig
from dynarep.diagnostics.td import on_policy_step, td_error
from dynarep.protocols import Metrics, Protocol
from dynarep.protocols.collect import Transitions, random_transitions
from dynarep.replay import Replay, draw
from dynarep.streams import stream

BLOCK = 64  # agent steps whose replay indices come from one keyed generator: resuming needs no generator state
TRAIN_ROWS = 256  # rows of the training set that its error is measured on


class Frozen(Protocol):
    """MAD-TD on a fixed buffer."""

    def __init__(
        self, environment: EnvironmentConfig, agent: AgentConfig, protocol: ProtocolConfig, seeds: Sequence[int]
    ) -> None:
        assert isinstance(agent, MadTDConfig)
        assert isinstance(protocol, FrozenConfig)
        self.config, self.seeds = protocol, list(seeds)
        self.metrics, self.total = Metrics(self.seeds), protocol.updates
        self._milestones = sorted({*protocol.measure_at, protocol.updates})
        self.env = envs.from_config(environment)
        self._collect()
        self.agent = MadTD(agent, self.env.obs_size, self.env.action_size, self.seeds)
        self._ceiling = environment.action_repeat * environment.reward_scale / (1 - agent.discount)

    def _collect(self) -> None:
        """Fill the training buffer and keep the held-out transitions with their simulator states."""
        c, o, a = self.config, self.env.obs_size, self.env.action_size
        fields = {"obs": (o,), "action": (a,), "reward": (), "next_obs": (o,), "mask": ()}
        self.replay = Replay(fields, len(self.seeds), c.transitions)
        held = Replay(fields, len(self.seeds), c.held_out)
        self.snapshots = []
        kept, out = [], []
        for seed in self.seeds:
            data = random_transitions(self.env, seed, c.transitions + c.held_out, snapshots=True)
            order = stream(seed, "held out").permutation(len(data))
            out.append(_rows(data, order[: c.held_out]))
            kept.append(_rows(data, np.sort(order[c.held_out :])))
            self.snapshots.append([data.snapshots[i] for i in order[: c.held_out]])
        self.replay.add({name: np.stack([rows[name] for rows in kept]) for name in fields})
        held.add({name: np.stack([rows[name] for rows in out]) for name in fields})
        self.held = held.data

    def advance(self) -> dict[str, float]:
        """Learn up to the end of a block of agent steps or to the next measurement, whichever comes first."""
        ratio = self.config.update_ratio
        if self.done == 0 and not self.metrics.rows[0]:
            self.measure()
        step = self.done // ratio
        stop = min(next(m for m in self._milestones if m > self.done) // ratio, (step // BLOCK + 1) * BLOCK)
        generators = [stream(seed, "replay", step // BLOCK) for seed in self.seeds]
        indices = draw(generators, self.replay.size, (BLOCK, ratio, self.agent.config.batch_size))
        for t in range(step, stop):
            self.agent.update(self.replay.rows(indices[:, t % BLOCK]))
        self.done = stop * ratio
        if self.done in self._milestones:
            self.measure()
        return {
            "on-policy TD error": float(np.median(self.metrics.latest("td_rms/on_policy"))),
            "held-out": float(np.median(self.metrics.latest("td_rms/validation"))),
        }

    @torch.no_grad()
    def measure(self) -> None:
        """Record the critic's error on training, held-out and on-policy transitions, and its values."""
        agent = self.agent
        values: dict[str, Tensor] = {}
        generators = [stream(seed, "measure", self.done) for seed in self.seeds]
        sets = {
            "train": self.replay.rows(draw(generators, self.replay.size, (TRAIN_ROWS,))),
            "validation": self.held,
            "on_policy": self._on_policy(),
        }
        for name, rows in sets.items():
            z, next_z = agent.encode(rows["obs"]), agent.encode(rows["next_obs"])
            error = td_error(agent, z, rows["action"], rows["reward"], next_z, rows["mask"])
            values |= {f"td_{kind}/{name}": error[kind] for kind in ("l2", "rms", "ce")}
            values[f"q/{name}"] = error["q"]
        values["td_rms/on_over_validation"] = values["td_rms/on_policy"] / values["td_rms/validation"]
        # Beyond the ceiling (rewards are at most 1 a frame) a value is divergence, not estimation: `mad-td` 4.1.
        q = values["q/on_policy"]
        values["diverged"] = ((q > self._ceiling) | ~torch.isfinite(q)).float()
        agent_step = self.config.transitions + self.config.held_out
        self.metrics.add(agent_step, agent_step * self.env.action_repeat, self.done, values)

    def _on_policy(self) -> Mapping[str, Tensor]:
        """Held-out states with the current policy's action, and what the simulator makes of it."""
        actions = self.agent.act(self.held["obs"])
        outcomes = [
            on_policy_step(self.env, states, action.numpy())
            for states, action in zip(self.snapshots, actions, strict=True)
        ]
        return {
            "obs": self.held["obs"],
            "action": actions,
            "reward": torch.from_numpy(np.stack([reward for reward, _ in outcomes])),
            "next_obs": torch.from_numpy(np.stack([following for _, following in outcomes])),
            "mask": self.held["mask"],  # the stored transition's, as in the reference
        }

    def state(self) -> dict[str, Any]:
        """Return the agent: the data are collected again, to the same bytes, from the seeds."""
        return self.agent.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the agent."""
        self.agent.load(state)


def _rows(data: Transitions, index: np.ndarray) -> dict[str, np.ndarray]:
    """Pick transitions; the mask is 0 at episode ends of either kind (`mad-td` 3.7)."""
    return {
        "obs": data.obs[index],
        "action": data.action[index],
        "reward": data.reward[index],
        "next_obs": data.next_obs[index],
        "mask": 1.0 - data.ended[index].astype(np.float32),
    }
