"""The td_spectrum protocol: is expected TD stable on a small random problem? Ours, a toy.

Standard linear TD analysis; not the paper's formula (see `dynarep.agents.linear_td`). For every seed:

    draw a problem (transition probabilities), a deterministic target policy and random features, independently
    behave at random: by every action but the target policy's, or by every action
    record the eigenvalues of the expected TD update, and the smallest one of each of its two terms

Nothing is simulated or learned. Variants of a seed share all that is drawn and differ in the behaviour and in the share
of on-policy rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynarep.agents.linear_td import LinearTD, random_features, smallest_symmetric, spectrum
from dynarep.configs import AgentConfig, EnvironmentConfig, ProtocolConfig
from dynarep.configs.linear_td import FEWEST, LinearTDConfig
from dynarep.configs.td_spectrum import TDSpectrumConfig
from dynarep.envs import EnvError, garnet
from dynarep.protocols import Metrics, Protocol
from dynarep.streams import stream

ROUNDING = 1e-9  # ours: float64's zero eigenvalues of a singular matrix, some 1e-16, do not count as negative


class TDSpectrum(Protocol):
    """One spectrum per seed.

    Raises:
        EnvError: a task that is not a table of probabilities.
    """

    unit = "spectra"

    def __init__(
        self, environment: EnvironmentConfig, agent: AgentConfig, protocol: ProtocolConfig, seeds: Sequence[int]
    ) -> None:
        assert isinstance(agent, LinearTDConfig)
        assert isinstance(protocol, TDSpectrumConfig)
        if environment.suite != "garnet":
            raise EnvError(f"{environment.task}: td_spectrum needs transition probabilities: take a task garnet-S-A-b")
        self.task, self.agent, self.config, self.seeds = environment.task, agent, protocol, list(seeds)
        self.metrics, self.total = Metrics(self.seeds), 1

    def advance(self) -> dict[str, float]:
        """Measure every seed."""
        found = [self.measure(seed) for seed in self.seeds]
        self.metrics.add(0, 0, 0, {name: [values[name] for values in found] for name in found[0]})
        self.done = 1
        return {"share unstable": float(np.mean(self.metrics.latest("spectrum/unstable")))}

    def measure(self, seed: int) -> dict[str, float]:
        """Return one seed's metrics."""
        td = self.problem(seed)
        eigenvalues = spectrum(td.update_matrix())
        values = {
            "spectrum/smallest_real": float(eigenvalues[0].real),
            "spectrum/unstable": float(eigenvalues[0].real < -ROUNDING),
            "stationary/smallest": smallest_symmetric(td.stationary_term()),
            "switch/smallest": smallest_symmetric(td.switch_term()),
        }
        for k, value in enumerate(eigenvalues[:FEWEST]):
            values |= {f"spectrum/{k}/real": float(value.real), f"spectrum/{k}/imaginary": float(value.imag)}
        return values

    def problem(self, seed: int) -> LinearTD:
        """Draw a seed's problem, policies and features, each from a stream of its own."""
        transitions = garnet.transitions(self.task, stream(seed, "transitions", self.task))
        states, actions, _ = transitions.shape
        target = np.eye(actions)[stream(seed, "target policy", self.task).integers(actions, size=states)]
        allowed = 1 - target if self.config.behaviour == "other_actions" else np.ones_like(target)
        behaviour = allowed / allowed.sum(1, keepdims=True)
        features = random_features(stream(seed, "features", self.task), states * actions, self.agent.features)
        return LinearTD(self.agent, transitions, behaviour, target, features)

    def state(self) -> dict[str, Any]:
        """Return nothing: the work is one piece."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore nothing."""
