"""What is timed: the updates at the papers' sizes, and how a burst of one is timed.

Operations are those of the matrix products alone (`update_flops`), as the algorithm needs them: work that an
implementation adds does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dynarep.agents.alm import ALM
from dynarep.agents.bro import BRO
from dynarep.agents.ensemble import Ensemble
from dynarep.agents.mad_td import MadTD
from dynarep.agents.sac import SAC
from dynarep.agents.td_mpc2 import TDMPC2
from dynarep.bench.eager import EagerMadTD
from dynarep.configs.alm import ALMConfig
from dynarep.configs.bro import BROConfig
from dynarep.configs.mad_td import MadTDConfig
from dynarep.configs.mbpo import EnsembleConfig
from dynarep.configs.sac import SACConfig
from dynarep.configs.td_mpc2 import TDMPC2Config
from dynarep.replay import Replay, normal
from dynarep.streams import stream

OBS, ACTION = 67, 21  # humanoid (ftfl 6.1)
DOG = 223, 38
BURST_S = 0.15  # a kernel is repeated for at least that long in a round
GEMM = 512  # side of the square matrices


@dataclass
class Kernel:
    """Something to time: GFLOP of one call, and calls in a burst."""

    name: str
    gflop: float
    call: Callable[[], object]
    repeats: int = 1

    def time(self) -> float:
        """Return seconds of processor time per call over one burst: what else the machine does counts little there."""
        started = time.process_time()
        for _ in range(self.repeats):
            self.call()
        return (time.process_time() - started) / self.repeats

    def settle(self, burst_s: float = BURST_S) -> None:
        """Warm up and find out how many calls make a burst."""
        self.call()
        self.call()
        self.repeats = max(1, round(burst_s / self.time()))


def gemm() -> Kernel:
    """Return the product of square matrices, which all else is set against."""
    a, b = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)
    out = torch.empty(GEMM, GEMM)
    return Kernel(f"matrix product {GEMM} x {GEMM}", 2 * GEMM**3 / 1e9, lambda: torch.mm(a, b, out=out))


def transitions(seeds: int, count: int) -> dict[str, Tensor]:
    """Return random transitions of every seed, obs (S, count, 67) and the rest."""
    shapes = {"obs": (OBS,), "action": (ACTION,), "reward": (), "next_obs": (OBS,), "mask": ()}
    rows = {name: torch.randn(seeds, count, *shape) for name, shape in shapes.items()}
    return rows | {"action": rows["action"].tanh(), "mask": torch.ones(seeds, count)}


def sac(seeds: int, width: int, batch: int) -> Kernel:
    """Return one update of SAC."""
    config = SACConfig(width=width, batch_size=batch)
    agent = SAC(config, OBS, ACTION, range(seeds))
    rows, noise = transitions(seeds, batch), agent.noise([stream(s, "bench") for s in range(seeds)])
    gflop = seeds * config.update_flops(OBS, ACTION) / 1e9
    name = f"SAC update, 2x{width}, batch {batch}, {seeds_of(seeds)}"
    return Kernel(name, gflop, lambda: agent.update(rows, noise, report=False))


def ensemble(seeds: int, width: int, batch: int) -> Kernel:
    """Return one step of MBPO's ensemble."""
    config = EnsembleConfig(model_width=width, model_batch_size=batch)
    model, rows = Ensemble(config, OBS, ACTION, range(seeds)), transitions(seeds, batch)
    gflop = seeds * config.update_flops(OBS, ACTION) / 1e9
    name = f"ensemble step, {config.members} x ({config.model_layers}x{width}), batch {batch}, {seeds_of(seeds)}"
    return Kernel(name, gflop, lambda: model.update(rows, report=False))


def rollouts(states: int) -> tuple[Kernel, Kernel]:
    """Return both ways to make one-step rollouts: the chosen member alone; all of them, of which one is then taken.

    Their operations are counted alike, one member per state: the share of the second says what it wastes.
    """
    config = EnsembleConfig()
    model, rows = Ensemble(config, OBS, ACTION, [0]), transitions(1, states)
    gflop = config.update_flops(OBS, ACTION) / 3 / config.members / config.model_batch_size * states / 1e9
    obs, action = rows["obs"], rows["action"]
    return (
        Kernel(f"rollout of {states:,} states, chosen members", gflop, lambda: model.sample(obs, action, [stream(0)])),
        Kernel(f"rollout of {states:,} states, all members", gflop, lambda: model.predict(obs, action)),
    )


def mad_td(seeds: int, width: int, batch: int, updates: int, model: bool = False) -> Kernel:
    """Return critic + actor updates, the encoding of their minibatches included; or encoder's and model's; or both.

    Both together are one agent step at that update ratio, without its environment.
    """
    config = MadTDConfig(width=width, batch_size=batch)
    agent, rows = MadTD(config, OBS, ACTION, range(seeds)), transitions(seeds, max(updates, 1) * batch)
    batches = {name: torch.unflatten(values, 1, (-1, batch)) for name, values in rows.items()}
    name, gflop = _mad_td_work(config, updates, model)
    name = f"MAD-TD {name}, width {width}, batch {batch}, {seeds_of(seeds)}"
    if not updates:
        return Kernel(name, seeds * gflop, lambda: agent.update_model(rows))
    return Kernel(name, seeds * gflop, lambda: agent.update(batches, learn_model=model))


def eager_mad_td(width: int, batch: int, updates: int, model: bool = False) -> Kernel:
    """Return the same work as `mad_td` of one seed, as PyTorch's own modules and optimisers do it."""
    config = MadTDConfig(width=width, batch_size=batch)
    agent, rows = EagerMadTD(config, OBS, ACTION), {name: v[0] for name, v in transitions(1, updates * batch).items()}
    batches = {name: torch.unflatten(values, 0, (-1, batch)) for name, values in rows.items()}
    name, gflop = _mad_td_work(config, updates, model)
    name = f"eager PyTorch: MAD-TD {name}, width {width}, batch {batch}, 1 seed"
    return Kernel(name, gflop, lambda: agent.update(batches, learn_model=model))


def _mad_td_work(config: MadTDConfig, updates: int, model: bool) -> tuple[str, float]:
    """Return the name and the GFLOP of so many updates of critic and actor, and of the model's if it learns."""
    by_model = config.model_update_flops(OBS, ACTION) / 1e9
    if not updates:
        return "model update", by_model
    gflop = updates * config.update_flops(OBS, ACTION) / 1e9 + model * by_model
    if not model:
        return "critic + actor update", gflop
    return f"{updates} critic + actor update{'s' if updates > 1 else ''} and 1 of the model", gflop


def bro(seeds: int, config: BROConfig) -> Kernel:
    """Return one update of BRO on the dog."""
    agent, batch = BRO(config, *DOG, range(seeds)), config.batch_size
    rows = dog_replay(seeds).rows(torch.arange(batch).repeat(seeds, 1)) | {"mask": torch.ones(seeds, batch)}
    noise = normal([stream(s, "bench") for s in range(seeds)], (3, batch, DOG[1])).unbind(1)
    gflop = seeds * config.update_flops(*DOG) / 1e9
    name = f"BRO update, critics {config.critic_width}, {config.quantiles} quantiles, batch {batch}, {seeds_of(seeds)}"
    return Kernel(name, gflop, lambda: agent.update(rows, noise, report=False))


def td_mpc2(seeds: int, update: bool) -> Kernel:
    """Return one update of TD-MPC2 of 5 M parameters, its noise and minibatch drawn; or the search of one action."""
    config = TDMPC2Config(pretrain=False)
    agent, replay = TDMPC2(config, *DOG, range(seeds), starts=[[0, 500] for _ in range(seeds)]), dog_replay(seeds)
    obs = torch.randn(seeds, DOG[0])
    agent.learn(replay, 499)  # until then it acts at random
    if update:
        gflop, name = config.update_flops(*DOG) / 1e9, "update, 5 M parameters, batch 256"
        return Kernel(f"TD-MPC2 {name}, {seeds_of(seeds)}", seeds * gflop, lambda: agent.learn(replay, 499))
    gflop, name = (
        config.plan_flops(*DOG) / 1e9,
        f"search of {config.iterations(DOG[1])} x {config.plan_samples} candidates",
    )
    return Kernel(f"TD-MPC2 {name}, {seeds_of(seeds)}", seeds * gflop, lambda: agent.explore(obs, 499))


def alm(seeds: int, config: ALMConfig) -> Kernel:
    """Return one update of ALM, encoder, model, reward network, classifier, critics and actor."""
    agent, steps, batch = ALM(config, OBS, ACTION, range(seeds)), config.horizon, config.batch_size
    sequences = {"obs": torch.randn(seeds, steps + 1, batch, OBS), "action": torch.rand(seeds, steps, batch, ACTION)}
    rows, noise = transitions(seeds, batch), agent.noise([stream(s, "bench") for s in range(seeds)])
    gflop = seeds * config.update_flops(OBS, ACTION) / 1e9
    name = f"ALM update, width {config.width}, model {config.model_width}, batch {batch}, {seeds_of(seeds)}"
    return Kernel(name, gflop, lambda: agent.update(sequences, rows, noise, config.std_final))


def dog_replay(seeds: int) -> Replay:
    """Return 500 random transitions of every seed, of the dog's sizes."""
    obs, action = DOG
    shapes = {"obs": (obs,), "action": (action,), "reward": (), "next_obs": (obs,)}
    replay = Replay(shapes, seeds, 500)
    replay.add({name: torch.randn(seeds, 500, *shape).tanh() for name, shape in shapes.items()})
    return replay


def seeds_of(count: int) -> str:
    """Return "1 seed" or "n seeds"."""
    return f"{count} seed{'s' if count > 1 else ''}"
