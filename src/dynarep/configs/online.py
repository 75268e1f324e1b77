"""The online protocol: act, store, learn, evaluate, step by step. FTFL's loop (`ftfl` 3.3), MAD-TD's (3.10)."""

from __future__ import annotations

from pydantic import model_validator

from dynarep.configs import AgentConfig, ProtocolConfig, Work, hp
from dynarep.configs.frozen import LATENT_METRICS, RETURN_METRICS
from dynarep.configs.model_fit import MODEL_METRICS

SNAPSHOT_KIB = 1.5  # of a simulator's state, measured on hopper and humanoid; for cost estimates alone


def asks_simulator(agent: AgentConfig) -> bool:
    """Return whether an agent learns from the simulator's outcomes in place of a model's, or of parts of them."""
    sources = (getattr(agent, "rollouts", ""), getattr(agent, "model_data", ""))
    return "simulator" in sources or getattr(agent, "oracle", "") in ("reward", "next_obs")


class OnlineConfig(ProtocolConfig):
    """Random actions first, then learning after every agent step; evaluated now and then in another environment."""

    name = "online"
    implementation = "dynarep.protocols.online:Online"
    agents = frozenset({"alm", "bro", "sac", "mbpo", "mad_td", "td_mpc2"})
    budget = frozenset({"steps", "random_steps", "eval_every", "eval_episodes", "measure_every"}) | {
        "held_out_rows",
        "sharpness_rows",
    }

    # Which of them a run has depends on its agent: without a model there are no synthetic/* and no model metrics; with
    # a critic on latents that says so there are that critic's, and no entropy; on Meta-World there are successes.
    metrics = frozenset(
        {"eval/return", "eval/length", "train/return", "return/final", "return/area", "return/area_learning"}
        | {"diverged"}
        | {f"critic/{name}" for name in ("q", "mc", "mc_soft", "bias", "bias_soft", "batch_q")}
        | {"batch/reward", "entropy", "temperature", "replay/reward", "synthetic/reward", "synthetic/negative"}
        | {"optimist/kl", "optimist/optimism", "optimist/kl_weight"}
        | {"return/random", "drawdown/mean", "drawdown/max"}
        | {"eval/success", "eval/success_last", "simulator/unstable"}
        | (LATENT_METRICS | RETURN_METRICS | {"critic/over_early"})
        | {metric for metric in MODEL_METRICS if "decile" not in metric}  # hundreds of times in one run: too many rows
    )

    steps: int = hp(500_000, "[code] agent steps on DMC (ftfl 3.3); Gym: 300 000", ge=1)
    random_steps: int = hp(10_000, "[code] uniform random actions without learning (ftfl 3.1)", ge=1)
    eval_every: int = hp(5_000, "[code] agent steps between evaluations (ftfl 3.3, step 5)", ge=1)
    eval_episodes: int = hp(10, "[code] noise-free episodes of an evaluation (ftfl 3.3, step 5)", ge=1)
    measure_every: int = hp(1_000, "ftfl 4.1: agent steps between measurements of model and minibatches", ge=1)
    replay_capacity: int = hp(1_000_000, "[code] real buffer (ftfl 3.3, step 1)", ge=1)
    horizon_margin: int = hp(
        500,
        "ours: states with as many agent steps left are compared with their return; 0.99^500 = 0.7 %. At action repeat "
        "2 an episode has 500, of which 250 (8 %) leave half its states to compare",
        ge=1,
    )

    # for agents with a critic on latents
    held_out: float = hp(
        0.0, "ftfl: none; [code] of MAD-TD: 0.05 of the transitions are not learned from (mad-td 3.10)", ge=0, lt=1
    )
    held_out_rows: int = hp(
        256, "ours: rows of a measurement of the three TD errors; [code]: 100 x 512 (mad-td 4.2)", ge=32, multiple_of=32
    )
    sharpness_rows: int = hp(0, "mad-td 4.3: states of a measurement, 1000 to 5000; 0: none", ge=0, multiple_of=32)

    @model_validator(mode="after")
    def _ends_with_an_evaluation(self) -> OnlineConfig:
        if self.steps % self.eval_every:
            raise ValueError(f"steps, {self.steps}: must be a multiple of eval_every, {self.eval_every}")
        if self.random_steps > self.steps:
            raise ValueError(f"random_steps, {self.random_steps}: must be at most steps, {self.steps}")
        if self.held_out and not 2 <= self.steps <= self.replay_capacity:
            raise ValueError(f"held_out, {self.held_out:g}: needs 2 steps or more, all kept: raise replay_capacity")
        return self

    def learning_steps(self) -> int:
        """Return the agent steps after which the agent learns."""
        return self.steps - self.random_steps

    def updates_after(self, steps: int, agent: AgentConfig) -> int:
        """Return the updates that an agent has made after so many agent steps, whatever model it has left out."""
        ratio = int(getattr(agent, "updates_per_step", 1))
        first = self.random_steps - ratio if getattr(agent, "pretrain", False) else 0  # beyond every other step's
        return first + (steps - self.random_steps) * ratio if steps > self.random_steps else 0

    def evaluations(self) -> tuple[int, int]:
        """Return how many there are along the run, and their episodes."""
        return self.steps // self.eval_every, self.eval_episodes

    def agent_steps(self) -> int:
        """Return training steps, and one simulator step per held-out row and measurement."""
        measurements = self.steps // self.measure_every - self.random_steps // self.measure_every
        return self.steps + (measurements * self.held_out_rows if self.held_out else 0)

    def work(self, agent: AgentConfig, obs_size: int, action_size: int) -> list[Work]:
        """Return acting, and what the agent learns."""
        acting = Work("act", 0.0, self.steps)
        work = [acting, *agent.learning_work(self.learning_steps(), obs_size, action_size)]
        if getattr(agent, "pretrain", False):
            work.append(agent.update_work(self.random_steps, obs_size, action_size))
        return work

    def rows(self, agent: AgentConfig) -> int:
        """Return the replay's transitions and those that the agent has made itself."""
        return min(self.steps, self.replay_capacity) + agent.own_rows(self.learning_steps())

    def memory_mib(self, agent: AgentConfig, obs_size: int, action_size: int, seeds: int) -> float:
        """Add the simulator's states, of all transitions where it is the model, else of those held out."""
        share = 1.0 if asks_simulator(agent) else self.held_out
        return (
            super().memory_mib(agent, obs_size, action_size, seeds) + seeds * share * self.steps * SNAPSHOT_KIB / 1024
        )
