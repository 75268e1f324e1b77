"""The model-fit protocol: one data set of real transitions, an ensemble fitted to it, judged on the rest. Ours.

    collect N transitions, of a random policy or of it and an expert in turns; a share of them is never trained on
    repeat:  one of MBPO's chunks on the rest (split, normalisers, gradient steps, elites)      `Ensemble.train_chunk`
             reward, state and variance on the transitions never seen, in raw units             `measure`

It isolates the model from the policy that learns from it: what a wrong reward model does next is another question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynarep import envs
from dynarep.agents.ensemble import FIELDS, Ensemble
from dynarep.configs import AgentConfig, EnvironmentConfig, ProtocolConfig
from dynarep.configs.mbpo import EnsembleConfig
from dynarep.configs.model_fit import ModelFitConfig
from dynarep.diagnostics import model
from dynarep.nets import EVEN
from dynarep.placement import here
from dynarep.protocols import Metrics, Protocol
from dynarep.protocols.collect import collect
from dynarep.streams import stream


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
        self._milestones = {*protocol.measure_at, protocol.updates}
        self._before = envs.frame_before(environment)
        self._collect(environment)
        obs, action = (self.training[name].shape[-1] for name in ("obs", "action"))
        self.ensemble = Ensemble(agent, obs, action, self.seeds)

    def _collect(self, environment: EnvironmentConfig) -> None:
        """Split each seed's transitions at random: rows for fitting, rows never seen, as many of the former again."""
        n, noise = self.config.transitions, self.config.expert_noise
        collected = collect(
            environment, self.seeds, n, expert_noise=noise if self.config.behaviour == "half_expert" else None
        )
        judged = max(EVEN, int(n * self.config.evaluation) // EVEN * EVEN)
        parts: list[list[dict[str, np.ndarray]]] = [[], [], []]
        for seed, data in zip(self.seeds, collected, strict=True):
            order = stream(seed, "evaluation split").permutation(n)
            for part, index in zip(parts, (order[judged:], order[:judged], order[judged : 2 * judged]), strict=True):
                part.append({name: getattr(data, name)[np.sort(index)] for name in FIELDS})
        self.training, self.evaluation, self.in_sample = (
            {name: here(np.stack([rows[name] for rows in part])) for name in FIELDS} for part in parts
        )

    def advance(self) -> dict[str, float]:
        """Fit one chunk and measure, if it is time."""
        chunk = self.done // self.config.chunk
        steps = min(self.config.chunk, self.total - self.done)
        self.ensemble.train_chunk(self.training, [stream(s, "model chunk", chunk) for s in self.seeds], steps)
        self.done += steps
        if not self.config.measure_at or self.done in self._milestones:
            self.measure()
        measured = self.metrics.latest("reward/nmse")
        return {"reward error / variance": float(np.median(measured))} if measured else {}

    def measure(self) -> None:
        """Record what the model knows of the transitions never seen, and of as many that it was fitted to."""
        generators = [stream(s, "measure", self.done) for s in self.seeds]
        values = model.report(self.ensemble, self.evaluation, generators, self.in_sample)
        if self.config.increments:
            generators = [stream(s, "measure", self.done, "increments") for s in self.seeds]
            values |= model.increments(self.ensemble, self.evaluation, generators, self._before)
        values["diverged"] = [float(not np.isfinite(v)) for v in values["reward/mse"]]
        n = self.config.transitions
        self.metrics.add(n, n * self.repeat, self.done, values)

    def state(self) -> dict[str, Any]:
        """Return the ensemble: the data are collected again, to the same bytes, from the seeds."""
        return dict(self.ensemble.state())

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the ensemble."""
        self.ensemble.load(state)
