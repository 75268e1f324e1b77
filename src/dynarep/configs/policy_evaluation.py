"""The policy-evaluation protocol: the value of a fixed policy, learned from synthetic transitions. Ours."""

from __future__ import annotations

from pydantic import model_validator

from dynarep.configs import AgentConfig, ProtocolConfig, Work, hp
from dynarep.configs.mbpo import MBPOConfig


class PolicyEvaluationConfig(ProtocolConfig):
    """Fit a model to transitions of the uniform random policy; then learn that policy's value from model and data."""

    name = "policy_evaluation"
    implementation = "dynarep.protocols.policy_evaluation:PolicyEvaluation"
    agents = frozenset({"mbpo"})
    budget = frozenset({"transitions", "model_updates", "chunk", "updates", "measure_at"})

    # The last two only where there is a model.
    metrics = frozenset(
        {f"q/{name}" for name in ("mean", "abs", "mc", "correlation", "abs_over_mc")}
        | {"diverged", "reward/nmse", "inflation/share"}
    )

    transitions: int = hp(10_000, "[code] random start steps before the first fit (ftfl 3.1)", ge=64)
    evaluation: float = hp(0.2, "ours: share of the transitions that neither model nor critics learn from", gt=0, lt=1)
    model_updates: int = hp(5000, "[code] gradient steps of one retraining (ftfl 3.3)", ge=1)
    chunk: int = hp(200, "[code] gradient steps per split, normaliser and choice of elites (ftfl 3.3)", ge=1)
    updates: int = hp(2000, "ours: updates of the critics", ge=1)
    measure_at: tuple[int, ...] = hp((), "ours: updates after which values are compared; the last always is one")
    margin: int = hp(
        400, "ours: states with as many agent steps left are compared with their return; 0.99^400 = 1.8 %", ge=1
    )
    small_head: float = hp(
        0.01, "ours: factor on the critics' last kernels at the start; at 1 their random output decides", ge=0
    )

    @model_validator(mode="after")
    def _measure_before_the_end(self) -> PolicyEvaluationConfig:
        for at in self.measure_at:
            if not 0 < at <= self.updates:
                raise ValueError(f"measure_at, {at}: must be in 1..updates, {self.updates}")
        return self

    def agent_steps(self) -> int:
        """Return collected steps."""
        return self.transitions

    def kept_steps(self) -> int:
        """Return collected steps."""
        return self.transitions

    def work(self, agent: AgentConfig, obs_size: int, action_size: int) -> list[Work]:
        """Return updates of the critics, about half of SAC's, and gradient steps of the ensemble."""
        assert isinstance(agent, MBPOConfig)
        critics = Work("sac", agent.update_flops(obs_size, action_size) / 2e9, self.updates)
        model = agent.model_work(self.model_updates, obs_size, action_size)
        return [critics, model] if agent.learns_a_model() else [critics]
