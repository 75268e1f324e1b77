"""The frozen protocol: a small fixed buffer, many updates. Ours (design section 5)."""

from __future__ import annotations

from pydantic import model_validator

from dynarep.configs import AgentConfig, ProtocolConfig, Work, hp
from dynarep.configs.mad_td import MadTDConfig

# Of the critic on given transitions (`protocols.evaluation.critic_on`); those of a model only where there is one.
LATENT_METRICS = frozenset(
    {f"{kind}/{rows}" for kind in ("td_l2", "td_rms", "td_ce", "q") for rows in ("train", "validation", "on_policy")}
    | {f"{kind}/{rows}" for kind in ("model_reward_rms", "model_latent_ce") for rows in ("validation", "on_policy")}
    | {"td_rms/on_over_validation", "model_reward_rms/on_over_validation", "ood_correlation"}
    | {f"model/{name}_loss" for name in ("reward", "model", "vaml", "model_critic", "total")}
    | {f"model/l2_{name}" for name in ("byol", "logits", "vaml", "action")}
    | {"model/q_mean", "latent/entropy", "latent/mean", "latent/std"}
    | {f"critic/{name}" for name in ("critic_loss", "l2_q_loss", "q1", "q2", "q1_std", "q2_std", "entropy")}
    | {f"critic/{name}" for name in ("target_diversity", "reward", "reward_std")}
    | {f"actor/{name}" for name in ("actor_loss", "action_churn", "mean_abs_action", "mean_action")}
    | {
        f"sharp/{name}/{place}"
        for name in ("gradient", "curvature", "ascent", "ascent_0.01", "ascent_0.05", "ascent_0.1", "descent", "random")
        for place in ("policy", "buffer")
    }
    | {"sharp/random_relative/policy", "sharp/random_relative/buffer"}
)

# Of the critic along episodes (`protocols.evaluation.critic_along`), where its values include no entropy.
RETURN_METRICS = frozenset(
    f"critic/{name}"
    for name in ("q", "mc", "bias", "mc_tail", "over", "over_abs", "q_over_mc", "q_over_ceiling", "over_peak")
)


class FrozenConfig(ProtocolConfig):
    """Collect transitions of a random policy once, then update without new data."""

    name = "frozen"
    implementation = "dynarep.protocols.frozen:Frozen"
    agents = frozenset({"mad_td"})
    budget = frozenset({"transitions", "held_out", "updates", "measure_at", "eval_episodes", "sharpness_rows"})

    metrics = LATENT_METRICS | (RETURN_METRICS - {"critic/over_peak"}) | {"eval/return", "eval/length", "diverged"}

    transitions: int = hp(500, "ours (design section 5): agent steps of random actions kept for training", ge=8)
    held_out: int = hp(
        64, "ours: further transitions of the same episodes, drawn at random, never trained on", ge=32, multiple_of=32
    )
    updates: int = hp(8000, "ours: critic updates; the last agent step's are all made", ge=1)
    measure_at: tuple[int, ...] = hp(
        (),
        "ours: updates after which diagnostics run, at the end of their agent step; before the first and the last too",
    )
    eval_episodes: int = hp(1, "ours: noise-free episodes after the last update; 0: no returns", ge=0)
    horizon_margin: int = hp(
        250, "ours: states with as many agent steps left are compared with their return; half of 500", ge=1
    )
    sharpness_rows: int = hp(0, "mad-td 4.3: states looked at in the end, 1000 to 5000; 0: none", ge=0, multiple_of=32)

    @model_validator(mode="after")
    def _measure_before_the_end(self) -> FrozenConfig:
        for at in self.measure_at:
            if not 0 < at <= self.updates:
                raise ValueError(f"measure_at, {at}: must be in 1..updates, {self.updates}")
        return self

    def measurements(self) -> int:
        """Return how often it is measured."""
        return len({0, *self.measure_at, self.updates})

    def evaluations(self) -> tuple[int, int]:
        """Return the one at the end, if it has episodes."""
        return min(1, self.eval_episodes), self.eval_episodes

    def agent_steps(self) -> int:
        """Return collected steps, and one simulator step per held-out state and measurement."""
        return self.transitions + self.held_out * (1 + self.measurements())

    def rows(self, agent: AgentConfig) -> int:
        """Return the collected transitions."""
        return self.transitions + self.held_out

    def work(self, agent: AgentConfig, obs_size: int, action_size: int) -> list[Work]:
        """Return what the agent learns."""
        assert isinstance(agent, MadTDConfig)
        steps = -(-self.updates // agent.updates_per_step)
        return agent.learning_work(steps, obs_size, action_size)
