"""What the protocols with a policy measure of it: noise-free episodes, and the critic on given transitions.

    played = `Evaluator.play`                 episodes of the policy as it stands, all seeds in lock-step
    `returns_of(played)`                      returns, lengths, successes
    `critic_along(agent, played, ...)`        the critic's values along them, beside what really came
    `critic_on(agent, training, held, ...)`   TD errors on trained, held-out and on-policy rows; latents; sharpness

There is no return of a policy that has no actions: where they are not finite, zeros are taken and the reward is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynarep.configs import EnvironmentConfig
from dynarep.diagnostics.critic import Episode, against_return, entropies, overestimation, values
from dynarep.diagnostics.latent import latent_report
from dynarep.diagnostics.sharpness import sharpness
from dynarep.diagnostics.td import generalisation
from dynarep.envs import EnvError, Step
from dynarep.envs.dial import Dial, Fleet
from dynarep.envs.workers import Call, raised, several, together
from dynarep.placement import here, host
from dynarep.protocols import Metrics, usable
from dynarep.replay import Part, Replay, spread
from dynarep.streams import integer, stream

EARLY_FRAMES = 200_000  # of the early peak of over-estimation (`mad-td` 4.1)
LARGEST_REWARD = {"dmc": 1.0, "metaworld": 10.0, "dial": 1.0}  # of a frame; Gymnasium's tasks have no common one
Generators = Sequence[np.random.Generator]
Simulate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
Act = Callable[[Tensor, np.ndarray, np.ndarray], Tensor]  # observations; numbers of their episodes, steps in them
Stepped = tuple[np.ndarray, np.ndarray, float, bool]  # obs, action, reward, success of an agent step


class Evaluator:
    """Environments of their own to play a block of seeds' policies in.

    Args:
        environment: the task.
        seeds: the run seeds, S of them.
        diverged: (S,) of bool, set where an action is not finite or the simulation blows up.
    """

    def __init__(self, environment: EnvironmentConfig, seeds: Sequence[int], diverged: np.ndarray) -> None:
        self.seeds, self.diverged = list(seeds), diverged
        self.unstable = np.zeros(len(self.seeds))  # simulations that blew up so far
        self.envs = several(environment, len(self.seeds))

    def play(self, agent: Any, episodes: int, at: int) -> list[list[Episode]]:
        """Play every seed's noise-free episodes, in lock-step; one begins when the seed's last is over.

        Args:
            agent: has `act`, observations (S, 1, o) -> actions (S, 1, a); one that wants to know of which episode they
                are, and which step of it, also `player`, see `agents.mppi`.
            episodes: how many of each seed.
            at: when in the run: with the seed, it names the episodes' first states.
        """
        if isinstance(self.envs[0], Dial):
            return self._play_together(self.envs[0], agent, episodes, at)
        act = _actor(agent, at)
        played: list[list[Episode]] = [[] for _ in self.seeds]
        first = [Call(env, "reset", (self._first(s, at, 0),)) for env, s in zip(self.envs, self.seeds, strict=True)]
        obs = np.stack(raised(together(first)))
        logs: list[list[Stepped]] = [[] for _ in self.seeds]
        while any(len(done) < episodes for done in played):
            places = np.array([[[len(done)], [len(log)]] for done, log in zip(played, logs, strict=True)])
            wanted = host(act(here(obs[:, None]), places[:, 0], places[:, 1]))[:, 0]
            playing = [k for k, done in enumerate(played) if len(done) < episodes]
            actions = [usable(wanted[k], k, self.diverged) for k in playing]
            steps = together([Call(self.envs[k], "step", (a,)) for k, a in zip(playing, actions, strict=True)])
            for k, action, gave in zip(playing, actions, steps, strict=True):
                step = None if isinstance(gave, EnvError) else gave
                if step is None:
                    self.diverged[k] = True
                    self.unstable[k] += 1
                else:
                    reward = step.reward if np.isfinite(wanted[k]).all() else math.nan
                    logs[k].append((obs[k].copy(), action, reward, step.success))
                    obs[k] = step.obs
                if step is None or step.terminated or step.truncated:
                    played[k].append(self._episode(k, logs[k], step))
                    logs[k] = []
                    if len(played[k]) < episodes:
                        obs[k] = self._reset(k, at, len(played[k]))
        return played

    def _play_together(self, env: Dial, agent: Any, episodes: int, at: int) -> list[list[Episode]]:
        """Play all of them at once."""
        shape, act = (len(self.seeds), episodes), _actor(agent, at)
        numbers = np.arange(episodes)[None].repeat(len(self.seeds), 0)
        fleet = Fleet(env, [self._first(seed, at, episode) for seed in self.seeds for episode in range(episodes)])
        log: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        while not fleet.over:
            obs = fleet.obs.reshape(*shape, -1)
            wanted = host(act(here(obs), numbers, np.full(shape, len(log))))
            finite = np.isfinite(wanted).all(-1)
            self.diverged |= ~finite.all(1)
            action = np.where(finite[..., None], wanted, 0.0)
            reward = fleet.step(action.reshape(-1, env.action_size)).reshape(shape)
            log.append((obs, action, np.where(finite, reward, math.nan)))
        obs, action, reward = (np.stack(values, 2) for values in zip(*log, strict=True))
        return [
            [Episode(obs[k, e], action[k, e], reward[k, e], terminated=False, success=None) for e in range(episodes)]
            for k in range(len(self.seeds))
        ]

    def _first(self, seed: int, at: int, episode: int) -> int:
        """Return the seed of an episode."""
        return integer(seed, "evaluation", at, episode)

    def _reset(self, k: int, at: int, episode: int) -> np.ndarray:
        return self.envs[k].reset(self._first(self.seeds[k], at, episode))

    def _episode(self, k: int, log: Sequence[Stepped], last: Step | None) -> Episode:
        """Make an episode of what was logged; it has no steps if the first one blew up."""
        env = self.envs[k]
        obs, action, reward, success = zip(*log, strict=True) if log else ([], [], [], [])
        return Episode(
            np.array(obs, np.float32).reshape(-1, env.obs_size),
            np.array(action, np.float32).reshape(-1, env.action_size),
            np.array(reward),
            terminated=last is not None and last.terminated,
            success=np.array(success, bool) if env.reports_success else None,
        )


def _actor(agent: Any, at: int) -> Act:
    """Return what acts in evaluation `at`: an agent's `player`, if there is one, or `act`."""
    player = agent.player(at) if hasattr(agent, "player") else None
    if player is None:
        return lambda obs, episodes, steps: agent.act(obs)
    act: Act = player.act
    return act


def returns_of(played: Sequence[Sequence[Episode]], unit: float = 1.0) -> dict[str, list[float]]:
    """Return each seed's mean return, in the task's own units, and length of its episodes, in agent steps.

    `unit` is what one of the task's own units of reward is called in the episodes (`reward_scale`): whoever scales
    rewards for the sake of learning still wants returns that compare.

    Where the task reports success, also the share of episodes that had it at any time (`eval/success`, BRO's rule) and
    in their last agent step (`eval/success_last`, TD-MPC2's; `mad-td` U13).
    """
    found = {
        "eval/return": [float(np.mean([e.reward.sum() for e in episodes])) / unit for episodes in played],
        "eval/length": [float(np.mean([len(e) for e in episodes])) for episodes in played],
    }
    if played[0][0].success is not None:
        found["eval/success"] = [float(np.mean([_success(e, slice(None)) for e in es])) for es in played]
        found["eval/success_last"] = [float(np.mean([_success(e, slice(-1, None)) for e in es])) for es in played]
    return found


def _success(episode: Episode, steps: slice) -> float:
    """Return whether any of these steps was a success; NaN if the policy had no actions."""
    assert episode.success is not None
    return float(episode.success[steps].any()) if np.isfinite(episode.reward).all() else math.nan


def ceiling(environment: EnvironmentConfig, discount: float) -> float:
    """Return the largest value that the task's rewards allow (`mad-td` 4.1); infinity where they have no bound."""
    most = LARGEST_REWARD.get(environment.suite, math.inf)
    return most * environment.action_repeat * environment.reward_scale / (1.0 - discount)


def critic_along(
    agent: Any, played: Sequence[Sequence[Episode]], margin: int, limit: float, generators: Generators = ()
) -> dict[str, list[float]]:
    """Compare the critic's values along each seed's episodes with what really came (`ftfl` 4.4, `mad-td` 4.1).

    Args:
        agent: has `q`, and `log_prob_sample` and `temperature` if its values include the entropy of later steps.
        played: episodes of each seed.
        margin: see `against_return`.
        limit: see `ceiling`.
        generators: one per seed, for the entropy if there is one.

    Returns:
        critic/{q,mc,bias}, with entropy also critic/{mc_soft,bias_soft}. Without, tail-corrected returns say more:
        critic/{mc_tail,over,over_abs,q_over_mc}, and critic/q_over_ceiling where there is a ceiling. `finite` is 1
        where all values were.
    """
    soft, discount = hasattr(agent, "log_prob_sample"), agent.config.discount
    obs, action = ([np.concatenate([getattr(e, name) for e in es]) for es in played] for name in ("obs", "action"))
    q = values(agent, obs, action)
    entropy = entropies(agent, obs, generators) if soft else [None] * len(played)
    found: dict[str, list[float]] = {}
    for k, episodes in enumerate(played):
        temperature = float(agent.temperature[k]) if soft else 0.0
        compared = against_return(episodes, q[k], entropy[k], discount, temperature, margin)
        if not soft:
            compared |= overestimation(episodes, q[k], discount, limit)
            if math.isinf(limit):
                del compared["q_over_ceiling"]
        for name, number in compared.items():
            found.setdefault(f"critic/{name}", []).append(number)
        found.setdefault("finite", []).append(float(np.isfinite(q[k]).all()))
    return found


def largest(metrics: Metrics, metric: str, now: Sequence[float], frame: int, until: float = math.inf) -> list[float]:
    """Return each seed's largest value of a metric up to frame `until`: of its rows, and of `now`, measured at `frame`.

    A run that is continued has its rows, so no peak is forgotten. NaN does not count, but for want of any number.
    """
    found = []
    for rows, value in zip(metrics.rows, now, strict=True):
        seen = [(row.frame, row.value) for row in rows if row.metric == metric]
        early = [number for when, number in (*seen, (frame, value)) if when <= until and not math.isnan(number)]
        found.append(max(early, default=math.nan))
    return found


@torch.no_grad()
def critic_on(
    agent: Any,
    training: Replay | Part,
    held: Part | None,
    simulate: Simulate | None,
    seeds: Sequence[int],
    at: int,
    rows: int,
    sharpness_rows: int,
) -> dict[str, Tensor]:
    """Measure a latent critic on stored transitions, those that it learns from and those that it never meets.

    Args:
        agent: a MadTD.
        training: what it learns from; its newest row is left out, as it is in learning.
        held: what it does not learn from; None: the three errors are not measured.
        simulate: true outcomes at rows of the replay, see `Simulator.simulate`; needed if `held` is given.
        seeds: the run seeds; all draws are keyed by them and `at`.
        at: when in the run.
        rows: of each of the three sets, a multiple of 32.
        sharpness_rows: states where the critic's sharpness is measured, a multiple of 32; 0: it is not.

    Returns:
        `generalisation`, `latent_report` on one fresh minibatch, and sharp/ + the keys of `sharpness`, each (S,).
    """

    def generators(purpose: str) -> list[np.random.Generator]:
        return [stream(seed, "measure", at, purpose) for seed in seeds]

    known = (training.sizes - 1).clamp(min=1).tolist()
    found: dict[str, Tensor] = {}
    if held is not None:
        assert simulate is not None
        indices = spread(generators("held out"), held.sizes.tolist(), rows)
        validation = held.rows(indices)
        action = agent.act(validation["obs"])
        next_obs, reward, _ = simulate(held.absolute(indices), action)
        # The mask is the stored transition's, as in the reference.
        on_policy = {**validation, "action": action, "reward": reward, "next_obs": next_obs}
        train = training.rows(spread(generators("train"), known, rows))
        found |= generalisation(agent, train, validation, on_policy)
    found |= latent_report(agent, training.rows(spread(generators("latent"), known, agent.config.batch_size)))
    if sharpness_rows:
        states = training.rows(spread(generators("sharpness"), known, sharpness_rows))
        measured = sharpness(agent, states["obs"], states["action"], generators("perturbation"))
        found |= {f"sharp/{name}": value for name, value in measured.items()}
    return found
