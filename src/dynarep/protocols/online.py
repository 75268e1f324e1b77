"""The online protocol: an agent lives in its environment, one step after the other (`ftfl` 3.3, 3.6).

    for i = 0 .. T - 1, all seeds in lock-step, each in an environment of its own:                         `step`
        a = uniform if i < random_steps else the agent's, with exploration; one that is not finite becomes 0
        s', r = env(a);  store (s, a, r, m, s'),  m = 0 only if the task truly ended, not at a time limit
        if i >= random_steps:  the agent learns;  every `measure_every` steps its model is judged             `measure`
        every `eval_every` steps:  noise-free episodes in another environment                                 `evaluate`

Agent steps are counted when they are complete; `frame` is their number times the action repeat. The first actions and
episodes are those of `collect.random_transitions` for the same seed.

Divergence is a result. A seed whose network or simulator yields a number that is not finite is `diverged` from then on,
goes on with zero actions where its own are not finite, and disturbs no other seed. There is no return of a policy that
has no actions: an evaluation of it is NaN, not the return of doing nothing. A simulation that blows up ends its
episode; the next one begins in the same agent step, with a zero action.

A checkpoint holds no simulator. Every episode is its seed and its actions, so it is played again from the replay.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynarep import envs
from dynarep.configs import AgentConfig, EnvironmentConfig, ProtocolConfig
from dynarep.configs.online import OnlineConfig
from dynarep.diagnostics.critic import Episode, against_return, entropies, values
from dynarep.diagnostics.model import report
from dynarep.envs import Env, EnvError, Snapshot, Step
from dynarep.protocols import Metrics, Protocol
from dynarep.replay import Replay, draw
from dynarep.streams import integer, stream

BLOCK = 25  # agent steps of one `advance`; a fixed number, so that a checkpoint's place does not depend on the machine
LAST = 5  # evaluations whose mean is the final return (`ftfl` 4.8)
UNSEEN = 10  # transitions that a model is judged on, at least
LEARNED = {"critic/batch_q": "q1", "batch/reward": "reward", "entropy": "entropy", "temperature": "temperature"}
SIMULATED = ("next_obs", "reward", "mask")


class Online(Protocol):
    """An agent in its environment, for a block of seeds.

    The agent is made of its configuration, the sizes of observation and action, the seeds and the task's name. It has
    the methods of `agents.sac.SAC`: explore, act, learn, q, log_prob_sample, state, load; and a temperature. One with a
    model, like `agents.mbpo.MBPO`, also has an `ensemble` and a buffer `synthetic`, and says so: `learns_a_model`.

    Raises:
        ValueError: the replay is too small to play an episode again, or all of them where the simulator is the model.
    """

    def __init__(
        self, environment: EnvironmentConfig, agent: AgentConfig, protocol: ProtocolConfig, seeds: Sequence[int]
    ) -> None:
        assert isinstance(protocol, OnlineConfig)
        self.config, self.seeds = protocol, list(seeds)
        self.metrics, self.total, self.unit = Metrics(self.seeds), protocol.steps, "agent steps"
        self.envs = [envs.from_config(environment) for _ in seeds]
        self.evaluators = [envs.from_config(environment) for _ in seeds]
        env = self.envs[0]
        fields = {"obs": (env.obs_size,), "action": (env.action_size,), "reward": (), "next_obs": (env.obs_size,)}
        capacity = min(protocol.replay_capacity, protocol.steps)
        self.replay = Replay({**fields, "mask": ()}, len(self.seeds), capacity)
        module, name = agent.implementation.split(":")
        make = getattr(importlib.import_module(module), name)
        self.agent: Any = make(agent, env.obs_size, env.action_size, self.seeds, environment.task)
        self._learns_a_model = getattr(agent, "learns_a_model", lambda: False)()

        # The simulator as the model (`ftfl` 4.7): its state before every stored transition, and one to restore them in.
        self.snapshots: list[list[Snapshot]] = [[] for _ in seeds]
        self._simulator = envs.from_config(environment) if getattr(agent, "rollouts", "") == "simulator" else None
        longest = protocol.steps if self._simulator else math.ceil(env.episode_frames / env.action_repeat)
        if capacity < min(protocol.steps, longest):
            raise ValueError(f"replay_capacity, {capacity}: must hold the {longest} transitions that are played again")

        shape = (protocol.random_steps, env.action_size)
        draws = [stream(s, "random actions").uniform(-1, 1, size=shape) for s in seeds]
        self._random_actions = np.stack(draws).astype(np.float32)
        self.diverged = np.zeros(len(self.seeds), bool)
        self.starts: list[list[int]] = [[] for _ in seeds]  # agent steps before each episode of a seed
        self.returns: list[list[float]] = [[] for _ in seeds]  # of the episodes that are over
        self._return = [0.0] * len(self.seeds)  # of the one under way
        self.obs = np.zeros((len(self.seeds), env.obs_size), np.float32)
        for k in range(len(self.seeds)):
            self._begin(k, 0)
        self._shown: dict[str, float] = {}

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
        wanted = self.agent.explore(torch.from_numpy(self.obs), i).numpy() if learning else self._random_actions[:, i]
        self._interact(wanted)
        terms = self.agent.learn(self.replay, i, self.simulate if self._simulator else None) if learning else {}
        self.done = i + 1
        if self.done == c.random_steps:
            self._record({"return/random": self._mean_returns(0)})
        if learning and self.done % c.measure_every == 0:
            self.measure(terms)
        if self.done % c.eval_every == 0:
            self.evaluate()
        if self.done == self.total:
            self._summarise()

    def _begin(self, k: int, at: int) -> None:
        """Start seed k's next episode, after `at` agent steps."""
        self.obs[k] = self.envs[k].reset(integer(self.seeds[k], "environment", len(self.starts[k])))
        self.starts[k].append(at)

    def _end(self, k: int, at: int) -> None:
        """End seed k's episode after `at` agent steps, and start the next."""
        self.returns[k].append(self._return[k])
        self._return[k] = 0.0
        self._begin(k, at)

    def _usable(self, k: int, action: np.ndarray) -> np.ndarray:
        """Return seed k's action if it is finite, else zeros."""
        if np.isfinite(action).all():
            return action
        self.diverged[k] = True
        return np.zeros_like(action)

    def _interact(self, wanted: np.ndarray) -> None:
        """Let every seed act once, (S, a), and store what happens."""
        rows: list[dict[str, Any]] = []
        for k, env in enumerate(self.envs):
            action = self._usable(k, wanted[k])
            before = env.snapshot() if self._simulator else None
            try:
                step = env.step(action)
            except EnvError:
                self.diverged[k], action = True, np.zeros_like(action)
                self._end(k, self.done)
                before = env.snapshot() if self._simulator else None
                step = env.step(action)
            if before:
                self.snapshots[k].append(before)
            mask = float(not step.terminated)
            row = {"obs": self.obs[k].copy(), "action": action, "reward": step.reward, "next_obs": step.obs}
            rows.append({**row, "mask": mask})
            self._return[k] += step.reward
            self.obs[k] = step.obs
            if step.terminated or step.truncated:
                self._end(k, self.done + 1)
        self.replay.add({name: np.stack([row[name] for row in rows])[:, None] for name in rows[0]})

    def simulate(self, indices: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take actions in the simulator at the states of stored transitions (`ftfl` 4.7).

        Args:
            indices: (S, n), rows of the replay.
            actions: (S, n, a); those that are not finite count as zeros.

        Returns:
            Next observations (S, n, o), rewards and masks (S, n). Where the simulation blows up, nothing moves, nothing
            is gained and the episode ends.
        """
        env = self._simulator
        assert env is not None
        out = {name: np.empty((*indices.shape, *self.replay.data[name].shape[2:]), np.float32) for name in SIMULATED}
        for k, (rows, wanted) in enumerate(zip(indices.tolist(), actions.numpy(), strict=True)):
            for j, row in enumerate(rows):
                env.restore(self.snapshots[k][row])
                try:
                    step = env.step(self._usable(k, wanted[j]))
                except EnvError:
                    self.diverged[k] = True
                    step = Step(self.replay.data["obs"][k, row].numpy(), 0.0, terminated=True, truncated=False)
                for name, value in zip(SIMULATED, (step.obs, step.reward, not step.terminated), strict=True):
                    out[name][k, j] = value
        next_obs, reward, mask = (torch.from_numpy(out[name]) for name in SIMULATED)
        return next_obs, reward, mask

    # -- measuring -----------------------------------------------------------------------------------------------

    def measure(self, terms: Mapping[str, Tensor]) -> None:
        """Record what the last update said, mean rewards of both buffers, and the model's fit to rows it never saw."""
        found = {metric: terms[key].tolist() for metric, key in LEARNED.items() if key in terms}
        for numbers in found.values():
            self.diverged |= ~np.isfinite(numbers)
        found["replay/reward"] = [float(line.mean()) for line in _stored_rewards(self.replay)]
        if hasattr(self.agent, "synthetic"):  # the whole buffer, which is what updates draw from
            lines = _stored_rewards(self.agent.synthetic)
            found["synthetic/reward"] = [float(line.mean()) if len(line) else math.nan for line in lines]
            found["synthetic/negative"] = [float((line < 0).mean()) if len(line) else math.nan for line in lines]
        self._record(found | (self._judge_model() if self._learns_a_model else {}))

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
        """Play noise-free episodes; record their returns, and the critic's values beside them (`ftfl` 4.4)."""
        c, agent = self.config, self.agent
        played = self._play()
        found: dict[str, list[float]] = {
            "eval/return": [float(np.mean([e.reward.sum() for e in episodes])) for episodes in played],
            "eval/length": [float(np.mean([len(e) for e in episodes])) for episodes in played],
            "train/return": self._mean_returns(self.done - c.eval_every),
        }
        obs, action = ([np.concatenate([getattr(e, name) for e in es]) for es in played] for name in ("obs", "action"))
        value = values(agent, obs, action)
        entropy = entropies(agent, obs, [stream(s, "evaluation", self.done, "entropy") for s in self.seeds])
        for k, episodes in enumerate(played):
            self.diverged[k] |= not np.isfinite(value[k]).all()
            temperature = float(agent.temperature[k])
            compared = against_return(
                episodes, value[k], entropy[k], agent.config.discount, temperature, c.horizon_margin
            )
            for name, number in compared.items():
                found.setdefault(f"critic/{name}", []).append(number)
        self._record({**found, "diverged": [float(flag) for flag in self.diverged]})
        self._shown = {"return": float(np.median(found["eval/return"]))}

    def _play(self) -> list[list[Episode]]:
        """Play every seed's evaluation episodes, in lock-step; one begins when the seed's last is over."""
        episodes = self.config.eval_episodes
        played: list[list[Episode]] = [[] for _ in self.seeds]
        obs = np.stack([self._reset_evaluator(k, 0) for k in range(len(self.seeds))])
        logs: list[list[tuple[np.ndarray, np.ndarray, float]]] = [[] for _ in self.seeds]
        while any(len(done) < episodes for done in played):
            wanted = self.agent.act(torch.from_numpy(obs[:, None])).numpy()[:, 0]
            for k, env in enumerate(self.evaluators):
                if len(played[k]) == episodes:
                    continue
                action, step = self._usable(k, wanted[k]), None
                try:
                    step = env.step(action)
                    reward = step.reward if np.isfinite(wanted[k]).all() else math.nan
                    logs[k].append((obs[k].copy(), action, reward))
                    obs[k] = step.obs
                except EnvError:
                    self.diverged[k] = True
                if step is None or step.terminated or step.truncated:
                    played[k].append(_episode(logs[k], env, terminated=step is not None and step.terminated))
                    logs[k] = []
                    if len(played[k]) < episodes:
                        obs[k] = self._reset_evaluator(k, len(played[k]))
        return played

    def _reset_evaluator(self, k: int, episode: int) -> np.ndarray:
        return self.evaluators[k].reset(integer(self.seeds[k], "evaluation", self.done, episode))

    def _mean_returns(self, since: int) -> list[float]:
        """Return each seed's mean return of the training episodes that ended after `since` agent steps; NaN if none."""
        chosen = [
            [r for end, r in zip(starts[1:], returns, strict=True) if end > since]
            for starts, returns in zip(self.starts, self.returns, strict=True)
        ]
        return [float(np.mean(returns)) if returns else math.nan for returns in chosen]

    def _summarise(self) -> None:
        """Record the final return and the area under the curve (`ftfl` 4.8)."""
        curves = [[row.value for row in rows if row.metric == "eval/return"] for rows in self.metrics.rows]
        final = [float(np.mean(curve[-LAST:])) for curve in curves]
        self._record({"return/final": final, "return/area": [float(np.mean(curve)) for curve in curves]})

    def _record(self, found: Mapping[str, Sequence[float]]) -> None:
        updates = max(0, self.done - self.config.random_steps) * self.agent.config.updates_per_step
        self.metrics.add(self.done, self.done * self.envs[0].action_repeat, updates, found)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return agent, replay and counters; the simulators are left out."""
        episodes = {"starts": [list(at) for at in self.starts], "returns": [list(r) for r in self.returns]}
        counters = {"steps": self.done, "return": list(self._return), "diverged": self.diverged.tolist()}
        return {"agent": self.agent.state(), "replay": self.replay.state(), **episodes, **counters}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`: play the episode under way again, all of them if their snapshots are needed."""
        self.done = state["steps"]
        self.agent.load(state["agent"])
        self.replay.load(state["replay"])
        self.diverged[:] = state["diverged"]
        self.starts, self.returns, self._return = state["starts"], state["returns"], state["return"]
        actions = self.replay.data["action"].numpy()
        for k, (seed, env) in enumerate(zip(self.seeds, self.envs, strict=True)):
            self.snapshots[k] = []
            bounds = [*self.starts[k], self.done]
            for episode in range(0 if self._simulator else len(bounds) - 2, len(bounds) - 1):
                self.obs[k] = env.reset(integer(seed, "environment", episode))
                for i in range(bounds[episode], bounds[episode + 1]):
                    if self._simulator:
                        self.snapshots[k].append(env.snapshot())
                    self.obs[k] = env.step(actions[k, i % self.replay.capacity]).obs


def _episode(log: Sequence[tuple[np.ndarray, np.ndarray, float]], env: Env, terminated: bool) -> Episode:
    """Make an episode of what was logged; it has no steps if the first one blew up."""
    obs, action, reward = zip(*log, strict=True) if log else ([], [], [])
    return Episode(
        np.array(obs, np.float32).reshape(-1, env.obs_size),
        np.array(action, np.float32).reshape(-1, env.action_size),
        np.array(reward),
        terminated,
    )


def _stored_rewards(replay: Replay) -> list[np.ndarray]:
    """Return each seed's stored rewards, float64, one array per seed: sums cannot know the block."""
    lines = zip(replay.data["reward"], replay.sizes.tolist(), strict=True)
    return [line[:size].double().numpy() for line, size in lines]
