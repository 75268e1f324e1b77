"""MBPO's and FTFL's hyperparameters. Sources: `ftfl n` is a section of the specification, [code] the STFL code.

A switch's default is what the reference code does, a quirk (`ftfl` 3.4) included; `alternative` is what it turns on.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import model_validator

from dynarep.configs import AgentConfig, Part, Work, hp
from dynarep.configs.sac import SACConfig


class EnsembleConfig(AgentConfig):
    """The probabilistic ensemble of MBPO and of its repair FTFL (arXiv 2510.01457), the model part alone."""

    name = "ensemble"
    implementation = "dynarep.agents.ensemble:Ensemble"
    budget = frozenset({"model_width", "model_batch_size", "holdout_draws"})

    # what is regressed: the two faults and the two repairs
    target: Literal["residual", "direct"] = hp("residual", "[code] s' - s; direct s' is FTFL's DNP (ftfl 3.5)")
    normalise_targets: bool = hp(False, "[code] raw units; on: FTFL's TUN (ftfl 3.5)")
    target_statistics: Literal["dimension", "block"] = hp(
        "dimension", "ftfl 3.5; alternative block: one scale for the state (root mean square), one for the reward"
    )
    target_refit: Literal["chunk", "welford"] = hp(
        "chunk", "ftfl 3.5, from each chunk's training part; alternative welford: from all real transitions so far"
    )
    epsilon: float = hp(1e-6, "[code] added to the standard deviations of inputs; of targets: ftfl 3.5", ge=0)
    epsilon_floor: bool = hp(
        False, "ftfl 3.5, epsilon is added; alternative: a deviation below it becomes 1", strict=True
    )
    separate_reward: bool = hp(
        False, "[code] one joint network; alternative: the reward-head control, a second network for r (ftfl 3.5)"
    )

    # networks
    members: int = hp(7, "[code] ensemble size", ge=1)
    elites: int = hp(5, "[code] members kept for rollouts", ge=1)
    model_width: int = hp(200, "[code] hidden units; Tuned FTFL: 400 and more (ftfl 3.5)", ge=8, multiple_of=8)
    model_layers: int = hp(4, "[code] hidden layers", ge=1)
    member_fan_in: bool = hp(
        True, "[code] initial kernels of variance 1 / (members in), quirk Q11; alternative: LeCun's 1 / in"
    )
    log_variance_max: float = hp(0.5, "[code] of network units")
    log_variance_min: float = hp(-10.0, "[code] of network units")
    learnable_bounds: bool = hp(
        False, "[code] those two are fixed, quirk Q2; alternative: original MBPO's, learned per output from there on"
    )
    bounds_penalty: float = hp(0.01, "original MBPO: factor of sum max - sum min, if bounds are learned", ge=0)

    # learning
    model_batch_size: int = hp(256, "[code] model minibatch", ge=1)
    model_lr: float = hp(3e-4, "[code]; original MBPO: 1e-3", gt=0)
    weight_decay: tuple[float, ...] = hp(
        (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4), "[code] of 0.5 ||W||^2, first to last layer, kernels only"
    )
    shared_batches: bool = hp(
        True, "[code] all members see the same minibatch, quirk Q1; alternative: rows of their own"
    )
    holdout: float = hp(0.2, "[code] share kept back for choosing elites", gt=0, lt=1)
    holdout_draws: int = hp(50_000, "[code] draws with replacement for the elites' score", ge=1)
    resplit: Literal["chunk", "never"] = hp(
        "chunk", "[code] every chunk splits anew, quirk Q4; alternative never: a transition keeps its part for good"
    )
    elite_score: Literal["network", "raw", "relative"] = hp(
        "network",
        "[code] mean squared error in network units, quirk Q3; alternatives: in raw units; relative to each output's "
        "variance",
    )

    def label(self) -> str:
        """Return the cell of the 2 x 2 design."""
        return f"{self.name}-{self.target}-{'normalised' if self.normalise_targets else 'raw'}"

    def update_flops(self, obs_size: int, action_size: int) -> float:
        """Return operations of one gradient step of all members: forward and two backward products."""
        return 3 * 2.0 * self.model_batch_size * self.members * self.kernel_entries(obs_size, action_size)

    def parameters(self, obs_size: int, action_size: int) -> int:
        """Return the numbers in all members."""
        return self.members * self.kernel_entries(obs_size, action_size)

    def kernel_entries(self, obs_size: int, action_size: int) -> int:
        """Return the kernel entries of one member, which are the multiply-adds of one row's forward pass."""
        w = self.model_width
        networks = 2 if self.separate_reward else 1
        hidden = (obs_size + action_size) * w + (self.model_layers - 1) * w * w
        return networks * hidden + w * 2 * (obs_size + 1)


class MBPOConfig(SACConfig, EnsembleConfig):
    """MBPO as in the STFL code; FTFL is `target: direct, normalise_targets: true` (`ftfl` 3.3, 3.5)."""

    name = "mbpo"
    implementation = "dynarep.agents.mbpo:MBPO"
    budget = (
        SACConfig.budget
        | EnsembleConfig.budget
        | {"model_chunks", "first_model_chunks", "chunk_steps", "retrain_every", "rollouts_per_step", "rollout_every"}
        | {"synthetic_capacity"}
    )

    # the model's schedule
    retrain_every: int = hp(250, "[code] agent steps between retrainings, warm-started", ge=1)
    model_chunks: int = hp(25, "[code] chunks of one retraining: split, normaliser, steps, elites", ge=1)
    first_model_chunks: int | None = hp(None, "[code] of the first retraining: as of every other; ours: more", ge=1)
    chunk_steps: int = hp(200, "[code] gradient steps of a chunk", ge=1)

    # synthetic data
    rollouts_per_step: int = hp(400, "[code] start states drawn from real data in every agent step", ge=1)
    rollout_every: int = hp(1, "[code] agent steps between rollouts; they are `rollouts_per_step` times as many", ge=1)
    rollout_length: int = hp(1, "[code] model steps of a rollout, always 1; longer ones without quirk Q8", ge=1)
    synthetic_share: float = hp(0.95, "[code] of a minibatch: 243 rows of 256; 0 is SAC (ftfl 4.5)", ge=0, le=1)
    synthetic_capacity: int = hp(1_000_000, "[code] rows, oldest overwritten: 2500 agent steps", ge=1)
    rollouts: Literal["model", "simulator"] = hp(
        "model", "[code]; alternative simulator: true transitions, no model at all (ftfl 4.7)"
    )
    oracle: Literal["none", "reward", "next_obs", "mean"] = hp(
        "none",
        "ours: what of a synthetic transition is not the model's: nothing; reward: it is the true one of (s, a); "
        "next_obs: it is a true one; mean: nothing, but the model's mean is taken without its noise",
    )
    terminations: Literal["reference", "intended"] = hp(
        "reference",
        "[code] as it runs: InvertedPendulum never ends (quirk Q9), Hopper's state has no lower bound; alternative: "
        "the rules as they were meant (ftfl 3.3)",
    )

    # uncertainty-aware descendants: which synthetic transitions are kept (ftfl 3.7)
    selection: Literal["none", "m2ac", "macura", "infoprop"] = hp(
        "none", "[code] all; alternatives: M2AC, MACURA, Infoprop on this backbone (ftfl 3.7)"
    )
    m2ac_horizon: int = hp(10, "M2AC: model steps (ftfl 3.7)", ge=1)
    m2ac_penalty: float = hp(1e-3, "M2AC: subtracted from the reward per nat; sweep 0, 1e-5, 1e-4 (ftfl 3.7)", ge=0)
    macura_horizon: int = hp(10, "MACURA: most model steps (ftfl 3.7)", ge=1)
    macura_scale: float = hp(5.0, "MACURA: xi, per task; Humanoid's, Hopper's is 30 (ftfl 3.7)", gt=0)
    macura_percentile: float = hp(95.0, "MACURA: zeta, per task; Humanoid's, Hopper's is 90 (ftfl 3.7)", ge=0, le=100)
    macura_history: int = hp(2000, "MACURA: rollout rounds whose thresholds are averaged (ftfl 3.7)", ge=1)
    infoprop_horizon: int = hp(100, "Infoprop: most model steps (ftfl 3.7)", ge=1)
    infoprop_resolution: float = hp(1e-6, "Infoprop: the smallest difference that counts, raw units (ftfl 3.7)", gt=0)
    infoprop_step_quantile: float = hp(0.9999, "Infoprop: of one-step losses, ends a rollout (ftfl 3.7)", ge=0, le=1)
    infoprop_sum_quantile: float = hp(0.01, "Infoprop: times the horizon, bounds the sum (ftfl 3.7)", ge=0, le=1)
    infoprop_rows: int = hp(10_000, "ours: real transitions that the quantiles are taken from", ge=1)

    @model_validator(mode="after")
    def _settings_that_go_together(self) -> MBPOConfig:
        if self.synthetic_capacity < self.rollouts_per_step * self.rollout_every:
            raise ValueError(
                f"synthetic_capacity, {self.synthetic_capacity}: must hold one step's rollouts, "
                f"{self.rollouts_per_step * self.rollout_every} (rollouts_per_step x rollout_every)"
            )
        if self.oracle != "none" and (self.rollouts == "simulator" or self.horizon() > 1 or self.selection != "none"):
            raise ValueError(f"oracle: {self.oracle} needs single steps of the model, all kept; drop the other switch")
        if self.rollouts == "simulator" and (self.rollout_length > 1 or self.selection != "none"):
            raise ValueError("rollouts: simulator takes single steps, all kept; drop rollout_length and selection")
        if self.rollout_length > 1 and self.selection != "none":
            raise ValueError(f"selection: {self.selection} has a horizon of its own; drop rollout_length")
        return self

    def label(self) -> str:
        """Return what tells MBPO's arms apart."""
        parts = [EnsembleConfig.label(self)]
        if self.rollouts == "simulator":
            parts = [f"{self.name}-simulator"]
        if self.selection != "none":
            parts.append(self.selection)
        if self.oracle != "none":
            parts.append(f"true-{self.oracle}" if self.oracle != "mean" else "mean")
        if self.synthetic_share != type(self).model_fields["synthetic_share"].default:
            parts.append(f"share{self.synthetic_share:g}")
        return "-".join(parts)

    def synthetic_rows(self) -> int:
        """Return how many of the `batch_size` rows of a minibatch are synthetic: 243 of 256."""
        return int(self.batch_size * self.synthetic_share + 1e-9)

    def learns_a_model(self) -> bool:
        """Return whether there is anything that needs the ensemble."""
        return self.synthetic_rows() > 0 and self.rollouts == "model"

    def horizon(self) -> int:
        """Return the most model steps of a rollout."""
        by_rule = {"m2ac": self.m2ac_horizon, "macura": self.macura_horizon, "infoprop": self.infoprop_horizon}
        return by_rule.get(self.selection, self.rollout_length)

    def learning_work(self, steps: int, obs_size: int, action_size: int) -> list[Work]:
        """Return SAC's updates, the retrainings, and the rollouts of `steps` agent steps."""
        work = self._as(SACConfig).learning_work(steps, obs_size, action_size)
        if self.rollouts == "simulator" and self.synthetic_rows():
            work.append(Work("simulator", 0.0, steps * self.rollouts_per_step))
        if self.learns_a_model():
            more = (self.first_model_chunks or self.model_chunks) - self.model_chunks
            chunks = math.ceil(steps / self.retrain_every) * self.model_chunks + more
            work.append(self.model_work(chunks * self.chunk_steps, obs_size, action_size))
            members = 1 if self.selection == "none" else self.members
            passes = self.rollouts_per_step * self.rollout_every * self.horizon() * members
            gflop = 2.0 * passes * self.kernel_entries(obs_size, action_size) / 1e9
            work.append(Work("rollout", gflop, math.ceil(steps / self.rollout_every)))
        return work

    def parameters(self, obs_size: int, action_size: int) -> int:
        """Return the numbers in SAC's networks and the ensemble."""
        return SACConfig.parameters(self, obs_size, action_size) + EnsembleConfig.parameters(
            self, obs_size, action_size
        )

    def model_work(self, updates: int, obs_size: int, action_size: int) -> Work:
        """Return gradient steps of the ensemble."""
        return self._as(EnsembleConfig).update_work(updates, obs_size, action_size)

    def own_rows(self, steps: int) -> int:
        """Return the synthetic transitions after `steps` agent steps of learning; a selection may keep fewer."""
        made = steps * self.rollouts_per_step * self.horizon() if self.synthetic_rows() else 0
        return min(self.synthetic_capacity, made)

    def _as(self, part: type[Part]) -> Part:
        """Return one half of this configuration."""
        return part(**{field: getattr(self, field) for field in part.model_fields})
