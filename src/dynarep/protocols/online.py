"""The online protocol: an agent lives in its environment, one step after the other (`ftfl` 3.3, 3.6, `mad-td` 3.10).

    for i = 0 .. T - 1, all seeds in lock-step, each in an environment of its own:                         `step`
        a = uniform if i < random_steps else the agent's, with exploration; one that is not finite becomes 0
        s', r = env(a);  store (s, a, r, m, s'),  m = 0 if the episode ended: see below
        if i >= random_steps:  the agent learns;  every `measure_every` steps it is looked at from inside     `measure`
        every `eval_every` steps:  noise-free episodes in another environment                                 `evaluate`

Agent steps are counted when they are complete; `frame` is their number times the action repeat. The first actions and
episodes are those of `collect.random_transitions` for the same seed.

SAC's targets stop where m = 0: only where the task truly ended, not at a time limit. MAD-TD's never stop, m multiplies
its losses: 0 at an end of either kind (`mad-td` 3.7). TD-MPC2 does not look at m.

With `held_out`, a share of the transitions is stored but never learned from. Which ones is drawn in advance, from the
seed alone; the first is always learned from and the second always held out, so that neither part is ever empty.

Divergence is a result. A seed whose network or simulator yields a number that is not finite is `diverged` from then on,
goes on with zero actions where its own are not finite, and disturbs no other seed. There is no return of a policy that
has no actions: an evaluation of it is NaN, not the return of doing nothing. A simulation that blows up ends its
episode; the next one begins in the same agent step, with a zero action.

A checkpoint holds no simulator. Every episode is its seed and its actions: the one under way is played again from the
replay, and earlier ones when the simulator's states in them are asked for (`Simulator`).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynarep.configs import AgentConfig, EnvironmentConfig, ProtocolConfig
from dynarep.configs.online import OnlineConfig, asks_simulator
from dynarep.diagnostics.model import report
from dynarep.diagnostics.stability import drawdown
from dynarep.envs import EnvError, episode_steps
from dynarep.envs.dial import Dial, Fleet
from dynarep.envs.workers import Call, in_workers, raised, several, together
from dynarep.placement import here, host
from dynarep.protocols import Metrics, Protocol, usable
from dynarep.protocols.evaluation import (
    EARLY_FRAMES,
    Evaluator,
    ceiling,
    critic_along,
    critic_on,
    largest,
    returns_of,
)
from dynarep.protocols.snapshots import ClosedForm, Simulator, play_again
from dynarep.replay import Part, Replay, draw
from dynarep.streams import integer, stream

BLOCK = 25  # agent steps of one `advance`; a fixed number, so that a checkpoint's place does not depend on the machine
LAST = 5  # evaluations whose mean is the final return (`ftfl` 4.8)
UNSEEN = 10  # transitions that a model is judged on, at least
LEARNED = {"critic/batch_q": "q1", "batch/reward": "reward", "entropy": "entropy", "temperature": "temperature"}
LEARNED |= {"optimist/kl": "optimist_kl", "optimist/optimism": "optimism", "optimist/kl_weight": "kl_weight"}  # BRO's


class Online(Protocol):
    """An agent in its environment, for a block of seeds.

    The agent is made of its configuration, the sizes of observation and action, the seeds and the task's name. It has
    the methods of `agents.sac.SAC`: explore, act, learn, q, state, load; and log_prob_sample and a temperature if its
    values include entropy. One with a model, like `agents.mbpo.MBPO`, also has an `ensemble` and a buffer `synthetic`,
    and says so: `learns_a_model`. One like `agents.mad_td.MadTD` has a critic on latents that can be looked at from
    inside, and says so: `latent_critic`. One that says `in_episodes`, like `agents.td_mpc2.TDMPC2`, is also given an
    episode's agent steps and where each episode began.

    Raises:
        ValueError: the replay is too small to play an episode again, or all of them where the simulator's states are
            needed; transitions are held out from an agent that wants the whole replay; learning would begin before an
            agent that learns from slices has one.
    """

    def __init__(
        self, environment: EnvironmentConfig, agent: AgentConfig, protocol: ProtocolConfig, seeds: Sequence[int]
    ) -> None:
        assert isinstance(protocol, OnlineConfig)
        self.config, self.seeds = protocol, list(seeds)
        self.metrics, self.total, self.unit = Metrics(self.seeds), protocol.steps, "agent steps"
        self.diverged = np.zeros(len(self.seeds), bool)
        self.envs = several(environment, len(self.seeds))
        self.evaluator = Evaluator(environment, seeds, self.diverged)
        env = self.envs[0]
        fields = {"obs": (env.obs_size,), "action": (env.action_size,), "reward": (), "next_obs": (env.obs_size,)}
        capacity = min(protocol.replay_capacity, protocol.steps)
        self.replay = Replay({**fields, "mask": ()}, len(self.seeds), capacity)
        module, name = agent.implementation.split(":")
        make = getattr(importlib.import_module(module), name)
        self.starts: list[list[int]] = [[] for _ in seeds]  # agent steps before each episode of a seed
        also: dict[str, Any] = {"units": env.units} if getattr(agent, "unit_free", False) else {}
        if agent.in_episodes:
            if protocol.random_steps < (least := agent.horizon):  # type: ignore[attr-defined]
                raise ValueError(f"random_steps, {protocol.random_steps}: must be at least {least}, a slice")
            also |= {"episode_steps": episode_steps(environment), "starts": self.starts}
        self.agent: Any = make(agent, env.obs_size, env.action_size, self.seeds, environment.task, **also)
        self._learns_a_model = getattr(agent, "learns_a_model", lambda: False)()

        self._latent = agent.latent_critic
        soft = hasattr(self.agent, "log_prob_sample")  # values with entropy have no bound
        self._ceiling = math.inf if soft else ceiling(environment, self.agent.config.discount)

        self.returns: list[list[float]] = [[] for _ in seeds]  # of the episodes that are over
        self._return = [0.0] * len(self.seeds)  # of the one under way
        self._split(environment, asks_simulator(agent))

        shape = (protocol.random_steps, env.action_size)
        draws = [stream(s, "random actions").uniform(-1, 1, size=shape) for s in seeds]
        self._random_actions = np.stack(draws).astype(np.float32)
        self.obs = np.zeros((len(self.seeds), env.obs_size), np.float32)
        self.fleet: Fleet | None = None  # dial tasks: all seeds' episodes as one
        self._begin_all(0)
        self._shown: dict[str, float] = {}

    def _split(self, environment: EnvironmentConfig, simulates: bool) -> None:
        """Choose the transitions that are held out, and those before which the simulator's state is kept.

        These are the held-out ones (`mad-td` 4.2), and all where the simulator is the model (`simulates`; `ftfl` 4.7).
        """
        c, env = self.config, self.envs[0]
        if c.held_out and not self._latent:
            raise ValueError(f"held_out, {c.held_out}: {self.agent.config.name} learns from the whole replay; drop it")
        needs_all = bool(c.held_out) or simulates
        longest = c.steps if needs_all else math.ceil(env.episode_frames / env.action_repeat)
        if self.replay.capacity < min(c.steps, longest):
            raise ValueError(
                f"replay_capacity, {self.replay.capacity}: must hold the {longest} transitions that are played again"
            )
        held = np.stack([stream(seed, "held out").random(c.steps) < c.held_out for seed in self.seeds])
        self.training: Replay | Part = self.replay
        self.held: Part | None = None
        if c.held_out:
            held[:, :2] = False, True
            self.training = Part(self.replay, [np.flatnonzero(~own) for own in held])
            self.held = Part(self.replay, [np.flatnonzero(own) for own in held])
        self.simulator: Simulator | ClosedForm | None = None
        if needs_all and isinstance(env, Dial):
            self.simulator = ClosedForm(env, self.seeds, self.replay)
        elif needs_all:
            wanted = np.ones_like(held) if simulates else held
            simulators = several(environment, len(self.seeds) if in_workers() else 1)
            self.simulator = Simulator(simulators, self.seeds, self.replay, self.starts, wanted, self.diverged)
        self._simulate = self.simulator.simulate if self.simulator and simulates else None

    # -- acting --------------------------------------------------------------------------------------------------

    def advance(self) -> dict[str, float]:
        """Take some agent steps."""
        for _ in range(min(BLOCK, self.total - self.done)):
            self.step()
        return self._shown

    def step(self) -> None:
        """Take one agent step with every seed: act, store, learn, and measure where it is time to."""
        c, i = self.config, self.done
        learning = i >= c.random_steps
        wanted = host(self.agent.explore(here(self.obs), i)) if learning else self._random_actions[:, i]
        self._interact(wanted)
        terms = self.agent.learn(self.training, i, self._simulate) if learning else {}
        self.done = i + 1
        if self.done == c.random_steps:
            self._record({"return/random": self._mean_returns(0)})
        if learning and self.done % c.measure_every == 0:
            self.measure(terms)
        if self.done % c.eval_every == 0:
            self.evaluate()
        if self.done == self.total:
            self._summarise()

    def _begin_all(self, at: int) -> None:
        """Start every seed's next episode, after `at` agent steps."""
        env = self.envs[0]
        if isinstance(env, Dial):
            self.fleet = self._fleet(env, len(self.starts[0]))
            self.obs = self.fleet.obs
            for starts in self.starts:
                starts.append(at)
        else:
            seeds = [integer(seed, "environment", len(self.starts[k])) for k, seed in enumerate(self.seeds)]
            calls = [Call(env, "reset", (seed,)) for env, seed in zip(self.envs, seeds, strict=True)]
            self.obs[:] = raised(together(calls))
            for starts in self.starts:
                starts.append(at)

    def _fleet(self, env: Dial, episode: int) -> Fleet:
        return Fleet(env, [integer(seed, "environment", episode) for seed in self.seeds])

    def _begin(self, k: int, at: int) -> None:
        """Start seed k's next episode, after `at` agent steps."""
        self.obs[k] = self.envs[k].reset(integer(self.seeds[k], "environment", len(self.starts[k])))
        self.starts[k].append(at)

    def _end(self, k: int, at: int) -> None:
        """End seed k's episode after `at` agent steps, and start the next."""
        self.returns[k].append(self._return[k])
        self._return[k] = 0.0
        self._begin(k, at)

    def _interact(self, wanted: np.ndarray) -> None:
        """Let every seed act once, (S, a), and store what happens."""
        if self.fleet:
            self._interact_together(self.fleet, wanted)
            return
        rows: list[dict[str, Any]] = []
        actions = [usable(action, k, self.diverged) for k, action in enumerate(wanted)]
        if self.simulator:
            self.simulator.keep(range(len(self.seeds)), self.done, self.envs)
        steps = together([Call(env, "step", (action,)) for env, action in zip(self.envs, actions, strict=True)])
        for k, (action, step) in enumerate(zip(actions, steps, strict=True)):
            if isinstance(step, EnvError):
                self.diverged[k], action = True, np.zeros_like(action)
                self.evaluator.unstable[k] += 1
                self._end(k, self.done)
                if self.simulator:
                    self.simulator.keep([k], self.done, self.envs)
                step = self.envs[k].step(action)
            mask = float(not (step.terminated or (self._latent and step.truncated)))
            row = {"obs": self.obs[k].copy(), "action": action, "reward": step.reward, "next_obs": step.obs}
            rows.append({**row, "mask": mask})
            self._return[k] += step.reward
            self.obs[k] = step.obs
            if step.terminated or step.truncated:
                self._end(k, self.done + 1)
        self.replay.add({name: np.stack([row[name] for row in rows])[:, None] for name in rows[0]})

    def _interact_together(self, fleet: Fleet, wanted: np.ndarray) -> None:
        """Do the same where all episodes begin and end together."""
        finite = np.isfinite(wanted).all(1)
        self.diverged |= ~finite
        action, obs = np.where(finite[:, None], wanted, 0.0), fleet.obs
        reward = fleet.step(action)
        mask = np.full_like(reward, not (self._latent and fleet.over))
        rows = {"obs": obs, "action": action, "reward": reward, "next_obs": fleet.obs, "mask": mask}
        self.replay.add({name: values[:, None] for name, values in rows.items()})
        self._return = [so_far + float(r) for so_far, r in zip(self._return, reward, strict=True)]
        self.obs = fleet.obs
        if fleet.over:
            for returns, total in zip(self.returns, self._return, strict=True):
                returns.append(total)
            self._return = [0.0] * len(self.seeds)
            self._begin_all(self.done + 1)

    # -- measuring -----------------------------------------------------------------------------------------------

    def measure(self, terms: Mapping[str, Tensor]) -> None:
        """Record what the last update said, mean rewards of both buffers, the model's fit, the critic from inside."""
        found = {metric: terms[key].tolist() for metric, key in LEARNED.items() if key in terms}
        for numbers in found.values():
            self.diverged |= ~np.isfinite(numbers)
        found["replay/reward"] = [float(line.mean()) for line in _stored_rewards(self.replay)]
        if hasattr(self.agent, "synthetic"):  # the whole buffer, which is what updates draw from
            lines = _stored_rewards(self.agent.synthetic)
            found["synthetic/reward"] = [float(line.mean()) if len(line) else math.nan for line in lines]
            found["synthetic/negative"] = [float((line < 0).mean()) if len(line) else math.nan for line in lines]
        found |= self._judge_model() if self._learns_a_model else {}
        self._record(found | (self._judge_critic() if self._latent else {}))

    def _judge_critic(self) -> dict[str, list[float]]:
        """Measure critic and model on rows that they learn from and on rows that they never meet (`mad-td` 4.2-4.4)."""
        c, simulate = self.config, self.simulator.simulate if self.simulator else None
        found = critic_on(
            self.agent, self.training, self.held, simulate, self.seeds, self.done, c.held_out_rows, c.sharpness_rows
        )
        return {metric: values.tolist() for metric, values in found.items()}

    def _judge_model(self) -> dict[str, list[float]]:
        """Judge the model on the transitions since its last training, and on as many that it was trained on."""
        c, i = self.config, self.done - 1
        every = self.agent.config.retrain_every
        trained = max(c.random_steps, i // every * every)  # the step whose learning began with a retraining
        oldest = self.done - self.replay.size
        known = trained + 1 - oldest
        if i - trained < UNSEEN or known <= 0:
            return {}
        streams = [[stream(s, "measure", self.done, part) for s in self.seeds] for part in ("rows", "noise")]
        unseen = torch.arange(trained + 1, self.done).repeat(len(self.seeds), 1)
        seen = oldest + draw(streams[0], known, (unseen.shape[1],))
        new, old = (self.replay.rows(steps % self.replay.capacity) for steps in (unseen, seen))
        found = report(self.agent.ensemble, new, streams[1], old)
        return {metric: numbers for metric, numbers in found.items() if metric in OnlineConfig.metrics}

    def evaluate(self) -> None:
        """Play noise-free episodes; record their returns, and the critic's values beside them (`ftfl` 4.4).

        A critic of undisturbed rewards whose mean value exceeds all that they allow has diverged while that lasts.
        """
        c, frame = self.config, self.done * self.envs[0].action_repeat
        played = self.evaluator.play(self.agent, c.eval_episodes, self.done)
        found = {
            **returns_of(played, self.envs[0].units.reward),
            "train/return": self._mean_returns(self.done - c.eval_every),
        }
        generators = [stream(s, "evaluation", self.done, "entropy") for s in self.seeds]
        found |= critic_along(self.agent, played, c.horizon_margin, self._ceiling, generators)
        if "critic/over" in found:
            over = found["critic/over"]
            found["critic/over_peak"] = largest(self.metrics, "critic/over", over, frame)
            found["critic/over_early"] = largest(self.metrics, "critic/over", over, frame, EARLY_FRAMES)
        if self.envs[0].reports_success:  # Meta-World, whose own step would hide them behind a reward of 0
            found["simulator/unstable"] = self.evaluator.unstable.tolist()
        self.diverged |= np.array(found.pop("finite")) == 0
        beyond = np.array(found["critic/q"]) > self._ceiling
        self._record({**found, "diverged": (self.diverged | beyond).astype(float).tolist()})
        self._shown = {"return": float(np.median(found["eval/return"]))}

    def _mean_returns(self, since: int) -> list[float]:
        """Return each seed's mean return of the training episodes that ended after `since` agent steps; NaN if none.

        In the task's own units, as in evaluations.
        """
        unit = self.envs[0].units.reward
        chosen = [
            [r / unit for end, r in zip(starts[1:], returns, strict=True) if end > since]
            for starts, returns in zip(self.starts, self.returns, strict=True)
        ]
        return [float(np.mean(returns)) if returns else math.nan for returns in chosen]

    def _summarise(self) -> None:
        """Record the final return, the area under the curve (`ftfl` 4.8), and how far it fell (`mad-td` 7.3).

        `return/area_learning` leaves out evaluations of the policy that had not learned yet (ours): in short runs they
        are many.
        """
        curves = [[row for row in rows if row.metric == "eval/return"] for rows in self.metrics.rows]
        returns = [[row.value for row in curve] for curve in curves]
        learned = [[row.value for row in curve if row.agent_step > self.config.random_steps] for curve in curves]
        falls = [drawdown(values) for values in learned]
        self._record(
            {
                "return/final": [float(np.mean(values[-LAST:])) for values in returns],
                "return/area": [float(np.mean(values)) for values in returns],
                "return/area_learning": [float(np.mean(values)) if values else math.nan for values in learned],
                "drawdown/mean": [mean for mean, _ in falls],
                "drawdown/max": [worst for _, worst in falls],
            }
        )

    def _record(self, found: Mapping[str, Sequence[float]]) -> None:
        updates = self.config.updates_after(self.done, self.agent.config)
        self.metrics.add(self.done, self.done * self.envs[0].action_repeat, updates, found)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return agent, replay and counters; the simulators are left out."""
        episodes = {"starts": [list(at) for at in self.starts], "returns": [list(r) for r in self.returns]}
        counters = {"steps": self.done, "return": list(self._return), "diverged": self.diverged.tolist()}
        counters["unstable"] = self.evaluator.unstable.tolist()
        return {"agent": self.agent.state(), "replay": self.replay.state(), **episodes, **counters}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`: play the episode under way again."""
        self.done = state["steps"]
        self.agent.load(state["agent"])
        self.replay.load(state["replay"])
        self.diverged[:] = state["diverged"]
        self.evaluator.unstable[:] = state["unstable"]
        self.starts[:] = state["starts"]
        self.returns, self._return = state["returns"], state["return"]
        actions = host(self.replay.data["action"])
        if isinstance(self.envs[0], Dial):
            self.fleet = self._fleet(self.envs[0], len(self.starts[0]) - 1)
            for step in range(self.starts[0][-1], self.done):
                self.fleet.step(actions[:, step % self.replay.capacity])
            self.obs = self.fleet.obs
            return
        for k, (seed, env) in enumerate(zip(self.seeds, self.envs, strict=True)):
            places = np.arange(self.starts[k][-1], self.done) % self.replay.capacity
            self.obs[k] = play_again(env, seed, len(self.starts[k]) - 1, actions[k, places])


def _stored_rewards(replay: Replay) -> list[np.ndarray]:
    """Return each seed's stored rewards, float64, one array per seed: sums cannot know the block."""
    lines = zip(replay.data["reward"], replay.sizes.tolist(), strict=True)
    return [host(line[:size].double()) for line, size in lines]
