"""MBPO's and FTFL's hyperparameters. Sources: `ftfl n` is a section of the specification, [code] the STFL code."""

from __future__ import annotations

from typing import Literal

from dynarep.configs import AgentConfig, hp


class EnsembleConfig(AgentConfig):
    """The probabilistic ensemble of MBPO and of its repair FTFL (arXiv 2510.01457), the model part alone."""

    name = "ensemble"
    implementation = "dynarep.agents.mbpo:Ensemble"
    budget = frozenset({"width", "batch_size", "holdout_draws"})

    # what is regressed: the two faults and the two repairs
    target: Literal["residual", "direct"] = hp("residual", "[code] s' - s; direct s' is FTFL's DNP (ftfl 3.5)")
    normalise_targets: bool = hp(False, "[code] raw units; on: FTFL's TUN, per output dimension (ftfl 3.5)")
    epsilon: float = hp(1e-6, "[code] added to the standard deviations of inputs; of targets: ftfl 3.5", ge=0)

    # networks
    members: int = hp(7, "[code] ensemble size", ge=1)
    elites: int = hp(5, "[code] members kept for rollouts", ge=1)
    width: int = hp(200, "[code] hidden units", ge=8, multiple_of=8)
    layers: int = hp(4, "[code] hidden layers", ge=1)
    log_variance_max: float = hp(0.5, "[code] fixed, not learned (quirk Q2)")
    log_variance_min: float = hp(-10.0, "[code] fixed, not learned (quirk Q2)")

    # learning
    batch_size: int = hp(256, "[code] model minibatch", ge=1)
    lr: float = hp(3e-4, "[code]; original MBPO: 1e-3", gt=0)
    weight_decay: tuple[float, ...] = hp(
        (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4), "[code] of 0.5 ||W||^2, first to last layer, kernels only"
    )
    shared_batches: bool = hp(True, "[code] all members see the same minibatch (quirk Q1); off: rows of their own")
    holdout: float = hp(0.2, "[code] share kept back for choosing elites, redrawn every chunk (quirk Q4)", gt=0, lt=1)
    holdout_draws: int = hp(50_000, "[code] draws with replacement for the elites' score", ge=1)

    def label(self) -> str:
        """Return the cell of the 2 x 2 design."""
        return f"{self.name}-{self.target}-{'normalised' if self.normalise_targets else 'raw'}"

    def update_flops(self, obs_size: int, action_size: int) -> float:
        """Return operations of one gradient step of all members: forward and two backward products."""
        w = self.width
        layers = (obs_size + action_size) * w + (self.layers - 1) * w * w + w * 2 * (obs_size + 1)
        return 3 * 2.0 * self.batch_size * self.members * layers
