"""The model-fit protocol: one data set of real transitions, an ensemble fitted to it, judged on the rest. Ours."""

from __future__ import annotations

from dynarep.configs import ProtocolConfig, hp


class ModelFitConfig(ProtocolConfig):
    """Collect transitions of a random policy, fit the model in MBPO's chunks, measure on transitions never seen."""

    name = "model_fit"
    implementation = "dynarep.protocols.model_fit:ModelFit"
    budget = frozenset({"transitions", "updates", "chunk"})

    metrics = frozenset(
        {f"reward/{name}" for name in ("mse", "variance", "nmse", "mean_real", "mean_predicted", "mean_ratio")}
        | {f"reward/{name}" for name in ("slope", "negative", "top_ratio", "sampled_sd_ratio")}
        | {f"reward/decile/{k}/{side}" for k in range(10) for side in ("real", "predicted")}
        | {"state/nmse", "diverged"}
    )

    transitions: int = hp(10_000, "[code] random start steps before the first fit (ftfl 3.1)", ge=32)
    evaluation: float = hp(0.2, "ours: share of the transitions that is only ever measured on", gt=0, lt=1)
    updates: int = hp(5000, "[code] gradient steps of one retraining (ftfl 3.3)", ge=1)
    chunk: int = hp(200, "[code] gradient steps per split, normaliser and choice of elites (ftfl 3.3)", ge=1)

    def agent_steps(self) -> int:
        """Return collected steps."""
        return self.transitions

    def agent_updates(self) -> int:
        """Return gradient steps of the ensemble."""
        return self.updates
