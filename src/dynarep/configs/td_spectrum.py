"""The td_spectrum protocol: is expected TD stable on a small random problem? Ours."""

from __future__ import annotations

from typing import Literal

from dynarep.configs import AgentConfig, ProtocolConfig, Work, hp
from dynarep.configs.linear_td import FEWEST


class TDSpectrumConfig(ProtocolConfig):
    """Draw a problem, a target policy and features; look at the eigenvalues of the expected TD update."""

    name = "td_spectrum"
    implementation = "dynarep.protocols.td_spectrum:TDSpectrum"
    agents = frozenset({"linear_td"})
    metrics = frozenset(
        {f"spectrum/{k}/{part}" for k in range(FEWEST) for part in ("real", "imaginary")}
        | {"spectrum/smallest_real", "spectrum/unstable", "stationary/smallest", "switch/smallest"}
    )

    behaviour: Literal["other_actions", "all_actions"] = hp(
        "other_actions",
        "ours: the data hold every action but the target policy's, as replay in a continuous action space never holds"
        " exactly the present policy's; all_actions: every action as often",
    )

    def label(self) -> str:
        """Return the behaviour policy."""
        return f"{self.name}-{self.behaviour}"

    def agent_steps(self) -> int:
        """Return 0: everything is an expectation, computed from the table of transition probabilities."""
        return 0

    def work(self, agent: AgentConfig, obs_size: int, action_size: int) -> list[Work]:
        """Return one matrix."""
        return [agent.update_work(1, obs_size, action_size)]
