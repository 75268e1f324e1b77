"""The model-fit protocol: one data set of real transitions, an ensemble fitted to it, judged on the rest. Ours.

    collect N transitions of a random policy; a share of them is never trained on
    repeat:  one of MBPO's chunks on the rest (split, normalisers, gradient steps, elites)      `Ensemble.train_chunk`
             reward and state prediction on the transitions never seen, in raw units            `measure`

It isolates the model from the policy that learns from it: what a wrong reward model does next is another question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dynarep import envs
from dynarep.agents.mbpo import Ensemble
from dynarep.configs import AgentConfig, EnvironmentConfig, ProtocolConfig
from dynarep.configs.mbpo import EnsembleConfig
from dynarep.configs.model_fit import ModelFitConfig
from dynarep.diagnostics import reward_fit
from dynarep.protocols import Metrics, Protocol
from dynarep.protocols.collect import random_transitions
from dynarep.streams import stream

EVEN = 32  # rows evaluated together are a multiple of this, see nets.py on block invariance


class ModelFit(Protocol):
    """Fit an ensemble to a fixed data set."""

    def __init__(
        self, environment: EnvironmentConfig, agent: AgentConfig, protocol: ProtocolConfig, seeds: Sequence[int]
    ) -> None:
        assert isinstance(agent, EnsembleConfig)
        assert isinstance(protocol, ModelFitConfig)
        self.config, self.seeds = protocol, list(seeds)
        self.metrics, self.total = Metrics(self.seeds), protocol.updates
        self.repeat = environment.action_repeat
        env = envs.make(environment.suite, environment.task, environment.action_repeat, environment.reward_scale)
        self._collect(env)
        self.ensemble = Ensemble(agent, env.obs_size, env.action_size, self.seeds)

    def _collect(self, env: envs.Env) -> None:
        """Split each seed's transitions at random into a part for fitting and a part for judging."""
        n = self.config.transitions
        judged = max(EVEN, int(n * self.config.evaluation) // EVEN * EVEN)
        parts: tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]] = ([], [])
        for seed in self.seeds:
            data = random_transitions(env, seed, n)
            order = stream(seed, "evaluation split").permutation(n)
            for part, index in zip(parts, (np.sort(order[judged:]), np.sort(order[:judged])), strict=True):
                fields = {"obs": data.obs, "action": data.action, "reward": data.reward, "next_obs": data.next_obs}
                part.append({name: values[index] for name, values in fields.items()})
        self.training, self.evaluation = (
            {name: torch.from_numpy(np.stack([rows[name] for rows in part])) for name in part[0]} for part in parts
        )

    def advance(self) -> dict[str, float]:
        """Fit one chunk and measure."""
        chunk = self.done // self.config.chunk
        steps = min(self.config.chunk, self.total - self.done)
        self.ensemble.train_chunk(self.training, [stream(s, "model chunk", chunk) for s in self.seeds], steps)
        self.done += steps
        self.measure()
        return {"reward error / variance": float(np.median(self.metrics.latest("reward/nmse")))}

    @torch.no_grad()
    def measure(self) -> None:
        """Record reward and state prediction on unseen transitions: mean over elites, and samples, in raw units."""
        data, ensemble = self.evaluation, self.ensemble
        prediction = ensemble.predict(data["obs"], data["action"])
        _, sampled = ensemble.sample(data["obs"], data["action"], [stream(s, "measure", self.done) for s in self.seeds])
        values: dict[str, list[float]] = {}
        for i in range(len(self.seeds)):
            elites = ensemble.elites[i]
            real = data["reward"][i].numpy()
            fit = reward_fit(prediction.reward[i, elites].double().mean(0).numpy(), real)
            spread = float(np.std(real.astype(np.float64)))
            fit["sampled_sd_ratio"] = float(sampled[i].double().std(correction=0)) / spread if spread else float("nan")
            following = data["next_obs"][i].double()
            error = (prediction.next_obs[i, elites].double().mean(0) - following).square().mean(0)
            variance = following.var(0, correction=0)
            varied = variance > 0
            state = {"nmse": float((error[varied] / variance[varied]).mean())}
            for metric, value in [(f"reward/{k}", v) for k, v in fit.items()] + [
                (f"state/{k}", v) for k, v in state.items()
            ]:
                values.setdefault(metric, []).append(value)
        values["diverged"] = [float(not np.isfinite(v)) for v in values["reward/mse"]]
        n = self.config.transitions
        self.metrics.add(n, n * self.repeat, self.done, values)

    def state(self) -> dict[str, Any]:
        """Return the ensemble: the data are collected again, to the same bytes, from the seeds."""
        return dict(self.ensemble.state())

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the ensemble."""
        self.ensemble.load(state)
