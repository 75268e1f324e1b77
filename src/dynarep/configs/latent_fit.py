"""The latent-fit protocol: one data set of real transitions, an aligned latent model fitted to it. Ours."""

from __future__ import annotations

from pydantic import model_validator

from dynarep.configs import AgentConfig, ProtocolConfig, Work, hp

# What `dynarep.diagnostics.aligned.report` returns, and what the protocol counts itself.
LATENT_METRICS = frozenset(
    {f"reward/{name}" for name in ("mse", "variance", "training_variance", "error", "r2", "slope")}
    | {"latent/r2", "probe/mean", "probe/median", "probe/worst", "probe/lost"}
    | {f"kl/{name}" for name in ("step", "mean_part", "sd_part")}
    | {f"sd/{name}" for name in ("prior", "target", "prior_floor", "target_floor")}
    | {f"saturated/{name}" for name in ("prior", "target")}
    | {f"objective/{name}" for name in ("reward", "kl_to_reward")}
    | {f"imagined/{name}" for name in ("intrinsic", "intrinsic_size", "reward_size", "intrinsic_to_reward")}
    | {"classifier/accuracy"}
    | {f"gradient/{name}" for name in ("kl", "reward", "value", "total")}
    | {f"q/{name}" for name in ("mc_tail", "over", "over_abs")}
)


class LatentFitConfig(ProtocolConfig):
    """Collect random transitions in short episodes, fit the agent to some of these, measure on the others."""

    name = "latent_fit"
    implementation = "dynarep.protocols.latent_fit:LatentFit"
    agents = frozenset({"alm"})
    budget = frozenset({"transitions", "episode_steps", "updates", "measure_at"})

    metrics = LATENT_METRICS | {"clip/share", "diverged"}

    transitions: int = hp(5000, "extensions A8: random transitions", ge=64)
    episode_steps: int = hp(
        100, "ours: episodes are ended here, so that those held out are many; extensions A7 (iv) wants 20 or more", ge=8
    )
    held_out: float = hp(0.2, "extensions A7: 80/20; ours: by episode, as A7 (iv) wants", gt=0, lt=1)
    updates: int = hp(3000, "extensions A8: the longest of 300, 1000 and 3000", ge=1)
    measure_at: tuple[int, ...] = hp((), "ours: updates after which it is measured; the last always is one")

    @model_validator(mode="after")
    def _whole_episodes(self) -> LatentFitConfig:
        if self.transitions % self.episode_steps:
            raise ValueError(
                f"transitions, {self.transitions}: must be a multiple of episode_steps, {self.episode_steps}"
            )
        if self.transitions < 2 * self.episode_steps:
            raise ValueError(
                f"transitions, {self.transitions}: less than two episodes, one to learn from, one to judge"
            )
        for at in self.measure_at:
            if not 0 < at <= self.updates:
                raise ValueError(f"measure_at, {at}: must be in 1..updates, {self.updates}")
        return self

    def episodes(self) -> tuple[int, int]:
        """Return how many episodes are learned from, and how many are held out, where none ends before its limit."""
        count = self.transitions // self.episode_steps
        held = min(count - 1, max(1, round(count * self.held_out)))
        return count - held, held

    def agent_steps(self) -> int:
        """Return collected steps."""
        return self.transitions

    def kept_steps(self) -> int:
        """Return collected steps."""
        return self.transitions

    def work(self, agent: AgentConfig, obs_size: int, action_size: int) -> list[Work]:
        """Return updates of the agent."""
        return [agent.update_work(self.updates, obs_size, action_size)]
