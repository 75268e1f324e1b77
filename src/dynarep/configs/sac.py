"""SAC's hyperparameters. Sources: `ftfl n` is a section of the specification, [code] the STFL code; D7: `ftfl` 3.8."""

from __future__ import annotations

from dynarep.configs import AgentConfig, Work, hp


class SACConfig(AgentConfig):
    """Soft actor-critic as in the STFL code: the model-free baseline, and the learner inside MBPO and FTFL."""

    name = "sac"
    implementation = "dynarep.agents.sac:SAC"
    budget = frozenset({"width", "batch_size", "updates_per_step"})

    # data
    updates_per_step: int = hp(20, "[code] flag default for SAC and MBPO alike (D7); a review says 1 for SAC", ge=1)
    batch_size: int = hp(256, "[code]; multiples of 32: nets.py on block invariance", ge=32, multiple_of=32)

    # networks
    width: int = hp(256, "[code] hidden units of actor and critics", ge=8, multiple_of=8)
    hidden_layers: int = hp(2, "[code] of actor and critics", ge=1)
    critic_layer_norm: bool = hp(False, "[code] flag, off; on: LayerNorm before every ReLU of the critics")

    # learning
    discount: float = hp(0.99, "[code] gamma", gt=0, lt=1)
    target_rate: float = hp(0.005, "[code] tau, the new fraction; after every critic step", gt=0, le=1)
    lr: float = hp(3e-4, "[code] Adam of actor, critics and temperature", gt=0)
    initial_temperature: float = hp(1.0, "[code] alpha", gt=0)
    unit_free: bool = hp(
        False,
        "[code] learns in the units that are reported; on: in the task's own units, ours, for dial tasks",
        strict=True,
    )
    target_entropy: float = hp(-0.5, "[code] per action dimension: -|A| / 2, not the usual -|A|")

    def label(self) -> str:
        """Return what tells SAC's arms apart: its update ratio."""
        return f"{self.name}-utd{self.updates_per_step}"

    def update_flops(self, obs_size: int, action_size: int) -> float:
        """Return operations of one update, two per multiply-add.

        With C and A the multiply-adds per row of both critics and of the actor: 6 C (targets, online forward, backward
        by kernel and by input, and the actor's loss forward and back) and 4 A (next action, own action, backward by
        kernel and by input), less what nobody needs: the online first layers' gradients by their input, C's
        2 (o + a) w and A's o w, and in the actor's loss the gradient by the observation, 2 o w.
        """
        o, a, w = obs_size, action_size, self.width
        hidden = (self.hidden_layers - 1) * w * w
        critics, actor = 2 * ((o + a) * w + hidden + w), o * w + hidden + w * 2 * a
        return 2.0 * self.batch_size * (6 * critics + 4 * actor - (5 * o + 2 * a) * w)

    def learning_work(self, steps: int, obs_size: int, action_size: int) -> list[Work]:
        """Return the updates of `steps` agent steps."""
        return [self.update_work(steps * self.updates_per_step, obs_size, action_size)]

    def parameters(self, obs_size: int, action_size: int) -> int:
        """Return the numbers in both critics, their targets and the actor."""
        o, a, w = obs_size, action_size, self.width
        hidden = (self.hidden_layers - 1) * w * w
        return 4 * ((o + a) * w + hidden + w) + o * w + hidden + w * 2 * a
