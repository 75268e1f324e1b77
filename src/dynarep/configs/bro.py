"""BRO's hyperparameters. Sources: `baselines n` is a section of the specification, [code] the official repository."""

from __future__ import annotations

from pydantic import field_validator

from dynarep.configs import AgentConfig, Work, hp


class BROConfig(AgentConfig):
    """BRO (arXiv 2405.16158): large regularised quantile critics, an optimistic actor, full resets."""

    name = "bro"
    implementation = "dynarep.agents.bro:BRO"
    budget = frozenset({"critic_width", "actor_width", "batch_size", "updates_per_step", "resets", "quantiles"})

    # data
    updates_per_step: int = hp(10, "[code] BRO; BRO (Fast): 2", ge=1)
    batch_size: int = hp(128, "[code]; multiples of 32: nets.py on block invariance", ge=32, multiple_of=32)
    resets: tuple[int, ...] = hp(
        (15_000, 50_000, 250_000, 500_000, 750_000, 1_000_000, 1_500_000, 2_000_000),
        "[code] once so many agent steps are behind, the learning of the next one begins with a reset: frames 15 001, "
        "50 001, .. (baselines A.3). See reset_steps",
    )

    # networks
    critic_width: int = hp(512, "[code]", ge=8, multiple_of=8)
    critic_blocks: int = hp(2, "[code]", ge=1)
    actor_width: int = hp(256, "[code] of both actors", ge=8, multiple_of=8)
    actor_blocks: int = hp(1, "[code] of both actors", ge=1)
    layer_norm: float = hp(1e-6, "[code] Flax's default epsilon", gt=0)
    quantiles: int = hp(100, "[code]; Huber threshold 1", ge=8, multiple_of=4)

    # learning
    discount: float = hp(0.99, "[code] all suites", gt=0, lt=1)
    target_rate: float = hp(0.005, "[code] the new fraction, after every critic step", gt=0, le=1)
    pessimism: float = hp(0.0, "[code] weight of the critics' disagreement in targets and actor; 1: the smaller", ge=0)
    lr: float = hp(3e-4, "[code] critics, actors, temperature", gt=0)
    weight_decay: float = hp(1e-4, "[code] decoupled, of all parameters of networks, biases and norms included", ge=0)
    scalar_beta1: float = hp(0.5, "[code] Adam of temperature, optimism, KL weight", ge=0, lt=1)
    initial_temperature: float = hp(1.0, "[code]", gt=0)
    target_entropy: float = hp(-0.5, "[code] per action dimension")

    # the optimistic actor
    optimist: bool = hp(
        True, "[code] off: the conservative actor explores, as in its `minimal` learner (baselines A.8)", strict=True
    )
    adjustment_lr: float = hp(3e-5, "[code] optimism and KL weight", gt=0)
    initial_optimism: float = hp(1.0, "[code]", gt=0)
    initial_kl_weight: float = hp(0.25, "[code]", gt=0)
    target_kl: float = hp(0.05, "[code] per action dimension", gt=0)
    std_multiplier: float = hp(0.75, "[code] of the conservative actor's deviation", gt=0)

    @field_validator("resets")
    @classmethod
    def _rising(cls, resets: tuple[int, ...]) -> tuple[int, ...]:
        if any(b <= a for a, b in zip((-1, *resets), resets, strict=False)):
            raise ValueError(f"resets, {list(resets)}: must be agent steps from 0 on, each after the one before")
        return resets

    def reset_steps(self) -> tuple[int, ...]:
        """Return the agent steps, counted from 0, whose learning begins with a reset.

        The reference's rule: with exactly 2 updates per step it is the first of `resets` alone.
        """
        return self.resets[:1] if self.updates_per_step == 2 else self.resets

    def label(self) -> str:
        """Return what tells BRO's arms apart: its update ratio, and what it goes without."""
        without = ("" if self.optimist else "-plain") + ("" if self.resets else "-noreset")
        return f"{self.name}-utd{self.updates_per_step}{without}"

    def update_flops(self, obs_size: int, action_size: int) -> float:
        """Return operations of one update, two per multiply-add.

        With C, A and P the multiply-adds per row of both critics, of the actor and of the optimist: 8 C (targets;
        forward, backward by kernel and by input; both actors' losses forward and back), 5 A (next action, own action,
        backward by kernel and by input, and the new actor for the optimist) and 3 P, less what nobody needs: the first
        layers' gradients by their input, or in the actors' losses by the observation.
        """
        o, a, (critics, actor, optimist) = obs_size, action_size, self._products(obs_size, action_size)
        per_row = 6 * critics + 4 * actor - self.critic_width * 2 * (2 * o + a) - self.actor_width * o
        if self.optimist:
            per_row += 2 * critics + actor + 3 * optimist - self.critic_width * 2 * o - self.actor_width * (o + a)
        return 2.0 * self.batch_size * per_row

    def _products(self, o: int, a: int) -> tuple[int, int, int]:
        """Return the multiply-adds per row of both critics, of the actor and of the optimist."""
        c, w = self.critic_width, self.actor_width
        blocks = 2 * self.actor_blocks * w * w
        critics = 2 * ((o + a) * c + 2 * self.critic_blocks * c * c + c * self.quantiles)
        return critics, o * w + blocks + w * 2 * a, (o + a) * w + blocks + w * a

    def learning_work(self, steps: int, obs_size: int, action_size: int) -> list[Work]:
        """Return the updates of `steps` agent steps."""
        return [self.update_work(steps * self.updates_per_step, obs_size, action_size)]

    def parameters(self, obs_size: int, action_size: int) -> int:
        """Return the numbers in both critics, their targets and both actors."""
        critics, actor, optimist = self._products(obs_size, action_size)
        return 2 * critics + actor + optimist
