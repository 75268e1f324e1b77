"""The frozen protocol: a small fixed buffer, many updates. Ours (design section 5)."""

from __future__ import annotations

from pydantic import model_validator

from dynarep.configs import AgentConfig, ProtocolConfig, Work, hp


class FrozenConfig(ProtocolConfig):
    """Collect transitions of a random policy once, then update without new data."""

    name = "frozen"
    implementation = "dynarep.protocols.frozen:Frozen"
    agents = frozenset({"mad_td"})
    budget = frozenset({"transitions", "held_out", "updates", "measure_at"})

    metrics = frozenset(
        {
            f"{kind}/{rows}"
            for kind in ("td_l2", "td_rms", "td_ce", "q")
            for rows in ("train", "validation", "on_policy")
        }
        | {"td_rms/on_over_validation", "diverged"}
    )

    transitions: int = hp(500, "ours (design section 5): agent steps of random actions kept for training", ge=8)
    held_out: int = hp(
        64, "ours: further transitions of the same episodes, drawn at random, never trained on", ge=32, multiple_of=32
    )
    updates: int = hp(8000, "ours: critic updates", ge=1)
    update_ratio: int = hp(16, "mad-td 1.3 C3: highest UTD; critic updates per model update", ge=1)
    measure_at: tuple[int, ...] = hp((), "ours: updates after which diagnostics run; the last always does")

    @model_validator(mode="after")
    def _measure_between_agent_steps(self) -> FrozenConfig:
        for at in (*self.measure_at, self.updates):
            if at % self.update_ratio or not 0 < at <= self.updates:
                allowed = f"a multiple of update_ratio {self.update_ratio} in 1..{self.updates}"
                raise ValueError(f"measure_at or updates, {at}: must be {allowed}")
        return self

    def agent_steps(self) -> int:
        """Return collected steps and one simulator step per held-out state and measurement."""
        return self.transitions + self.held_out * (1 + len({0, *self.measure_at, self.updates}))

    def work(self, agent: AgentConfig, obs_size: int, action_size: int) -> list[Work]:
        """Return critic updates, and those of actor and model that come with them."""
        return [agent.update_work(self.updates, obs_size, action_size)]
