"""Linear TD: hyperparameters. A toy of ours for MAD-TD's stability argument; no agent of either paper."""

from __future__ import annotations

from dynarep.configs import AgentConfig, hp

FEWEST = 32  # eigenvalues that a run records, so that every run records the same metrics


class LinearTDConfig(AgentConfig):
    """Expected semi-gradient TD(0) on action values that are linear in random features."""

    name = "linear_td"
    implementation = "dynarep.agents.linear_td:LinearTD"

    features: int = hp(32, "ours: about half of the problems with 20 states diverge without model rows", ge=FEWEST)
    discount: float = hp(0.99, "MAD-TD's ([code]; mad-td 5)", ge=0, lt=1)
    on_policy_share: float = hp(0.0, "ours: MAD-TD's model-data fraction, 0.05 there (mad-td 3.7)", ge=0, le=1)

    def label(self) -> str:
        """Return the share of on-policy rows."""
        return f"{self.name}-{self.on_policy_share:g}"

    def update_flops(self, obs_size: int, action_size: int) -> float:
        """Return operations to build and decompose one matrix; `obs_size` is the number of states."""
        pairs = obs_size * action_size
        return 6.0 * pairs * pairs * self.features + 40.0 * self.features**3

    def parameters(self, obs_size: int, action_size: int) -> int:
        """Return the number of weights."""
        return self.features
