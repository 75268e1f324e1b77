"""The model-fit protocol: one data set of real transitions, an ensemble fitted to it, judged on the rest. Ours."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from dynarep.configs import AgentConfig, ProtocolConfig, Work, hp

# What `dynarep.diagnostics.model.report` returns.
MODEL_METRICS = frozenset(
    {f"reward/{name}" for name in ("mse", "variance", "nmse", "mean_real", "mean_predicted", "mean_ratio")}
    | {f"reward/{name}" for name in ("slope", "negative", "top_ratio", "sampled_sd_ratio")}
    | {f"reward/decile/{k}/{side}" for k in range(10) for side in ("real", "predicted")}
    | {"state/nmse"}
    | {f"{rows}/{base}" for rows in ("pme", "pme_in") for base in ("delta", "absolute")}
    | {f"variance/log_{units}" for units in ("network", "raw", "raw_state", "raw_reward")}
    | {"variance/mean_raw", "variance/state_share", "variance/in_sample_log_network"}
    | {f"inflation/{name}" for name in ("share", "energy", "log_ratio")}
    | {f"gradient/{name}" for name in ("reward", "state", "share")}
)

# What `dynarep.diagnostics.model.increments` returns; recorded on request.
INCREMENT_METRICS = frozenset(
    f"increment/{name}" for name in ("live", "below_floor", "over_reward", "nmse", "r2", "sd_ratio", "inflated")
)


class ModelFitConfig(ProtocolConfig):
    """Collect transitions, fit the model to them in MBPO's chunks, measure on transitions never seen."""

    name = "model_fit"
    implementation = "dynarep.protocols.model_fit:ModelFit"
    agents = frozenset({"ensemble"})
    budget = frozenset({"transitions", "updates", "chunk", "measure_at"})

    metrics = MODEL_METRICS | INCREMENT_METRICS | {"diverged"}

    transitions: int = hp(10_000, "[code] random start steps before the first fit (ftfl 3.1)", ge=64)
    behaviour: Literal["random", "half_expert"] = hp(
        "random",
        "[code] start steps (ftfl 3.1); alternative half_expert: every second episode is that of Meta-World's scripted "
        "expert, so that objects move (extensions B8)",
    )
    expert_noise: float = hp(0.1, "ours: deviation of the noise on an expert's action, as MAD-TD explores", ge=0)
    increments: bool = hp(
        False, "ours: whether s' - s is measured as well, where s' alone would flatter (extensions B8)", strict=True
    )
    evaluation: float = hp(0.2, "ours: share of the transitions that is only ever measured on", gt=0, lt=1)
    updates: int = hp(5000, "[code] gradient steps of one retraining (ftfl 3.3)", ge=1)
    chunk: int = hp(200, "[code] gradient steps per split, normaliser and choice of elites (ftfl 3.3)", ge=1)
    measure_at: tuple[int, ...] = hp((), "ours: updates after which it is measured, and the last; none: every chunk")

    @model_validator(mode="after")
    def _measure_between_chunks(self) -> ModelFitConfig:
        for at in self.measure_at:
            if not 0 < at <= self.updates or (at % self.chunk and at != self.updates):
                allowed = f"a multiple of chunk {self.chunk} in 1..{self.updates}"
                raise ValueError(f"measure_at, {at}: must be {allowed}, or the last update")
        return self

    def label(self) -> str:
        """Return the protocol's name, and whose transitions they are if not a random policy's."""
        return self.name if self.behaviour == "random" else f"{self.name}-{self.behaviour}"

    def agent_steps(self) -> int:
        """Return collected steps."""
        return self.transitions

    def kept_steps(self) -> int:
        """Return collected steps."""
        return self.transitions

    def work(self, agent: AgentConfig, obs_size: int, action_size: int) -> list[Work]:
        """Return gradient steps of the ensemble."""
        return [agent.update_work(self.updates, obs_size, action_size)]
