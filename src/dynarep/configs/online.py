"""The online protocol: act, store, learn, evaluate, step by step. FTFL's loop (`ftfl` 3.3), later MAD-TD's too."""

from __future__ import annotations

from pydantic import model_validator

from dynarep.configs import AgentConfig, ProtocolConfig, Work, hp
from dynarep.configs.model_fit import MODEL_METRICS

SNAPSHOT_KIB = 1.5  # of a simulator's state, measured on hopper and humanoid; for cost estimates alone
EPISODE_STEPS = 1000  # agent steps of an evaluation episode, for cost estimates alone: the limit at action repeat 1


class OnlineConfig(ProtocolConfig):
    """Random actions first, then learning after every agent step; evaluated now and then in another environment."""

    name = "online"
    implementation = "dynarep.protocols.online:Online"
    agents = frozenset({"sac", "mbpo"})
    budget = frozenset({"steps", "random_steps", "eval_every", "eval_episodes", "measure_every"})

    # Which of them a run has depends on its agent: without a model there are no synthetic/* and no model metrics.
    metrics = frozenset(
        {"eval/return", "eval/length", "train/return", "return/final", "return/area", "diverged"}
        | {f"critic/{name}" for name in ("q", "mc", "mc_soft", "bias", "bias_soft", "batch_q")}
        | {"batch/reward", "entropy", "temperature", "replay/reward", "synthetic/reward", "synthetic/negative"}
        | {"return/random"}
        | {metric for metric in MODEL_METRICS if "decile" not in metric}  # hundreds of times in one run: too many rows
    )

    steps: int = hp(500_000, "[code] agent steps on DMC (ftfl 3.3); Gym: 300 000", ge=1)
    random_steps: int = hp(10_000, "[code] uniform random actions without learning (ftfl 3.1)", ge=1)
    eval_every: int = hp(5_000, "[code] agent steps between evaluations (ftfl 3.3, step 5)", ge=1)
    eval_episodes: int = hp(10, "[code] noise-free episodes of an evaluation (ftfl 3.3, step 5)", ge=1)
    measure_every: int = hp(1_000, "ftfl 4.1: agent steps between measurements of model and minibatches", ge=1)
    replay_capacity: int = hp(1_000_000, "[code] real buffer (ftfl 3.3, step 1)", ge=1)
    horizon_margin: int = hp(
        500, "ours: states with as many agent steps left are compared with their return; 0.99^500 = 0.7 %", ge=1
    )

    @model_validator(mode="after")
    def _ends_with_an_evaluation(self) -> OnlineConfig:
        if self.steps % self.eval_every:
            raise ValueError(f"steps, {self.steps}: must be a multiple of eval_every, {self.eval_every}")
        if self.random_steps > self.steps:
            raise ValueError(f"random_steps, {self.random_steps}: must be at most steps, {self.steps}")
        return self

    def learning_steps(self) -> int:
        """Return the agent steps after which the agent learns."""
        return self.steps - self.random_steps

    def agent_steps(self) -> int:
        """Return training and evaluation steps; no episode is taken to be longer than 1000 agent steps."""
        return self.steps + self.steps // self.eval_every * self.eval_episodes * EPISODE_STEPS

    def work(self, agent: AgentConfig, obs_size: int, action_size: int) -> list[Work]:
        """Return acting, evaluation included, and what the agent learns."""
        acting = Work("act", 0.0, self.agent_steps())
        return [acting, *agent.learning_work(self.learning_steps(), obs_size, action_size)]

    def rows(self, agent: AgentConfig) -> int:
        """Return the replay's transitions and those that the agent has made itself."""
        return min(self.steps, self.replay_capacity) + agent.own_rows(self.learning_steps())

    def memory_mib(self, agent: AgentConfig, obs_size: int, action_size: int, seeds: int) -> float:
        """Add the simulator's states, where it is the model."""
        states = self.steps if getattr(agent, "rollouts", "") == "simulator" else 0
        return super().memory_mib(agent, obs_size, action_size, seeds) + seeds * states * SNAPSHOT_KIB / 1024
