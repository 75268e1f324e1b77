"""MBPO: model-based policy optimisation as in the STFL code (`ftfl` 3.3), and FTFL, its repair (arXiv 2510.01457).

    every agent step, after its transition was stored in the real buffer R:                                   `learn`
        every 250 agent steps:  retrain the ensemble on R, warm-started, 25 chunks of 200 steps             `_retrain`
        400 states s from R;  a ~ pi(s);  s', r ~ ensemble(s, a);  m = 0 if s' ends the episode             `_rollout`
        store (s, a, r, m, s') in the synthetic buffer G
        20 SAC updates, each on 243 transitions from G and 13 from R                                        `_improve`

FTFL is the same loop with another regression target: `agents/ensemble.py`, which also lists the quirks. SAC is
`agents/sac.py`, untouched; with a synthetic share of 0 this is SAC, to the last bit, and no model is trained.

Beyond the reference: rollouts of more than one step, from which finished rows are dropped (quirk Q8), rules that choose
among synthetic transitions (`agents/selection.py`), the simulator in the place of the model (`ftfl` 4.7), and, ours,
in the place of one half of it: the oracle arms (`_true`) ask through what a bad model does its harm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynarep import process
from dynarep.agents import selection
from dynarep.agents.ensemble import FIELDS, Ensemble
from dynarep.agents.sac import OWN, SAC
from dynarep.configs import Units
from dynarep.configs.mbpo import MBPOConfig
from dynarep.placement import moved
from dynarep.replay import Replay, draw
from dynarep.streams import streams
from dynarep.terminations import termination

Simulate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
Generators = Sequence[np.random.Generator]


class MBPO:
    """MBPO for a block of seeds.

    Args:
        config: hyperparameters.
        obs_size: length of an observation.
        action_size: length of an action in [-1, 1].
        seeds: the run seeds trained together, S of them.
        task: names the rule by which imagined states end an episode, see `dynarep.terminations`.
        units: see `SAC`; the model learns in the units that are reported, whatever they are.

    Attributes:
        sac: the learner.
        ensemble: the model.
        synthetic: G, transitions of the model; each seed has as many as its rollouts yielded.
        last_model_terms: what `Ensemble.train_chunk` said last, each (S,): in-sample, as the reference logs it (Q10).
    """

    def __init__(
        self,
        config: MBPOConfig,
        obs_size: int,
        action_size: int,
        seeds: Sequence[int],
        task: str = "",
        units: Units = OWN,
    ) -> None:
        self.config, self.seeds = config, list(seeds)
        self.sac = SAC(config, obs_size, action_size, seeds, task, units)
        self.ensemble = Ensemble(config, obs_size, action_size, seeds)
        fields = {"obs": (obs_size,), "action": (action_size,), "reward": (), "next_obs": (obs_size,), "mask": ()}
        self.synthetic = Replay(fields, len(self.seeds), config.synthetic_capacity)
        self.last_model_terms: dict[str, Tensor] = {}
        self._ends = termination(task, config.terminations)
        self._rule = selection.make(config, obs_size + 1, seeds)

    # -- acting: SAC's -------------------------------------------------------------------------------------------

    @property
    def temperature(self) -> Tensor:
        """The entropy's weight alpha, (S,)."""
        return self.sac.temperature

    def explore(self, obs: Tensor, step: int) -> Tensor:
        """Return sampled actions (S, a) for one observation per seed, (S, o), at agent step `step`."""
        return self.sac.explore(obs, step)

    def act(self, obs: Tensor) -> Tensor:
        """Return noise-free actions (S, B, a) for observations (S, B, o)."""
        return self.sac.act(obs)

    def q(self, obs: Tensor, action: Tensor) -> Tensor:
        """Return the smaller of both critics' values, (S, B), of observations (S, B, o) and actions (S, B, a)."""
        return self.sac.q(obs, action)

    def log_prob_sample(self, obs: Tensor, generators: Generators) -> tuple[Tensor, Tensor]:
        """Return sampled actions (S, B, a) and their log-probabilities (S, B) for observations (S, B, o)."""
        return self.sac.log_prob_sample(obs, generators)

    # -- learning ------------------------------------------------------------------------------------------------

    def learn(self, replay: Replay, step: int, simulate: Simulate | None = None) -> dict[str, Tensor]:
        """Do all learning of agent step `step`.

        Args:
            replay: R, with the transition of this step.
            step: agent step, from 0.
            simulate: indices into R (S, n) and actions (S, n, a) -> true next_obs (S, n, o), reward and mask (S, n);
                needed if `config.rollouts` is "simulator", and by the oracle arms.

        Returns:
            What `SAC.update` says of the last update.
        """
        c = self.config
        if c.synthetic_rows() == 0:
            return self.sac.learn(replay, step)
        if c.learns_a_model() and (step % c.retrain_every == 0 or not self.last_model_terms):
            self._retrain(replay, step)
        if step % c.rollout_every == 0 or self.synthetic.size == 0:
            self._rollout(replay, step, simulate)
        return self._improve(replay, step)

    def _retrain(self, replay: Replay, step: int) -> None:
        """Train the ensemble on the real transitions, from where it stands."""
        c, generators = self.config, self._streams("model", step)
        chunks = c.model_chunks if self.last_model_terms else c.first_model_chunks or c.model_chunks
        data = {name: replay.data[name][:, : replay.size] for name in FIELDS}
        for _ in range(chunks):
            self.last_model_terms = self.ensemble.train_chunk(data, generators, c.chunk_steps)
        if self._rule is not None:
            self._rule.fit(self.ensemble, replay, generators)

    def _rollout(self, replay: Replay, step: int, simulate: Simulate | None) -> None:
        """Fill the synthetic buffer from real states and the policy's actions."""
        c, generators = self.config, self._streams("rollout", step)
        start = draw(generators, replay.size, (c.rollouts_per_step * c.rollout_every,))
        obs = replay.rows(start)["obs"]
        if c.rollouts == "simulator":
            assert simulate is not None, "rollouts: simulator needs a protocol that can simulate"
            action, _ = self.log_prob_sample(obs, generators)
            next_obs, reward, mask = simulate(start, action)
            self.synthetic.add({"obs": obs, "action": action, "reward": reward, "next_obs": next_obs, "mask": mask})
            return
        alive = torch.ones(start.shape, dtype=torch.bool, device=obs.device)
        for h in range(c.horizon()):
            action, _ = self.log_prob_sample(obs, generators)
            if self._rule is None:
                next_obs, reward = self.ensemble.sample(obs, action, generators, noisy=c.oracle != "mean")
                if c.oracle in ("reward", "next_obs"):
                    next_obs, reward = self._true(start, action, next_obs, reward, simulate)
                store = go_on = alive
            else:
                prediction = self.ensemble.predict(obs, action)
                next_obs, reward, store, go_on = self._rule.choose(
                    h, prediction, self.ensemble.elites, generators, alive
                )
            ended = self._ends(next_obs)
            mask = (~ended).float()
            rows = {"obs": obs, "action": action, "reward": reward, "next_obs": next_obs, "mask": mask}
            self.synthetic.add(rows, store)
            alive, obs = go_on & ~ended, next_obs
            if not alive.any():  # of any seed; the others' numbers were drawn in vain
                break

    def _true(
        self, start: Tensor, action: Tensor, next_obs: Tensor, reward: Tensor, simulate: Simulate | None
    ) -> tuple[Tensor, Tensor]:
        """Put the true reward, or a true next state, in the place of the model's; the other half stays its own."""
        assert simulate is not None, f"oracle: {self.config.oracle} needs a protocol that can simulate"
        true_next_obs, true_reward, _ = simulate(start, action)
        return (next_obs, true_reward) if self.config.oracle == "reward" else (true_next_obs, reward)

    def _improve(self, replay: Replay, step: int) -> dict[str, Tensor]:
        """Make the SAC updates on synthetic and real transitions; a seed without any synthetic ones takes real ones."""
        c, synthetic = self.config, self.config.synthetic_rows()
        generators = self._streams("replay", step)
        shape = c.updates_per_step, synthetic
        imagined = self.synthetic.rows(draw(generators, self.synthetic.sizes.clamp(min=1).tolist(), shape))
        real = replay.rows(draw(generators, replay.size, (c.updates_per_step, c.batch_size - synthetic)))
        empty = self.synthetic.sizes == 0
        if empty.any():
            instead, empty = replay.rows(draw(generators, replay.size, shape)), moved(empty, process.device())
            for name, values in imagined.items():
                values[empty] = instead[name][empty]
        both = {name: torch.cat([values, real[name]], 2) for name, values in imagined.items()}
        batches = [{name: values[:, k] for name, values in both.items()} for k in range(c.updates_per_step)]
        return self.sac.updates(batches, step)

    def _streams(self, purpose: str, step: int) -> list[np.random.Generator]:
        return streams(self.seeds, purpose, step)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return everything that learning changes, as a flat dictionary of tensors."""
        parts: dict[str, Mapping[str, Any]] = {
            "sac": self.sac.state(), "ensemble": self.ensemble.state(), "synthetic": self.synthetic.state(),
            "terms": self.last_model_terms, "rule": self._rule.state() if self._rule else {},
        }  # fmt: skip
        return {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state()`, in place."""
        parts: dict[str, dict[str, Any]] = {}
        for name, value in state.items():
            part, rest = name.split("/", 1)
            parts.setdefault(part, {})[rest] = value
        self.sac.load(parts["sac"])
        self.ensemble.load(parts["ensemble"])
        self.synthetic.load(parts["synthetic"])
        self.last_model_terms = parts.get("terms", {})
        if self._rule:
            self._rule.load(parts.get("rule", {}))
