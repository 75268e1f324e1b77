"""TD-MPC2's hyperparameters. Sources: `baselines n` is a section of the specification, [code] the repository."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from dynarep.configs import AgentConfig, Work, hp


class TDMPC2Config(AgentConfig):
    """TD-MPC2 (arXiv 2310.16828), single task, from states: the model of 5 M parameters."""

    name = "td_mpc2"
    implementation = "dynarep.agents.td_mpc2:TDMPC2"
    in_episodes = True
    budget = frozenset({"encoder_width", "width", "latent", "batch_size", "plan_samples", "plan_elites", "plan_priors"})

    # data
    updates_per_step: int = hp(1, "[code] per agent step", ge=1)
    pretrain: bool = hp(
        True, "[code] where learning begins, as many updates at once as there were random steps", strict=True
    )
    batch_size: int = hp(256, "[code] slices", ge=32, multiple_of=32)
    horizon: int = hp(3, "[code] of slices and of the planner", ge=1)

    # networks
    encoder_width: int = hp(256, "[code] 5 M model", ge=8, multiple_of=8)
    width: int = hp(512, "[code] 5 M model: hidden units of all others", ge=8, multiple_of=8)
    latent: int = hp(512, "[code] 5 M model", ge=8, multiple_of=8)
    simnorm_group: int = hp(8, "[code]", ge=2)
    layer_norm: float = hp(1e-5, "[code] PyTorch's default epsilon", gt=0)
    critics: int = hp(5, "[code] Q-functions", ge=2)
    dropout: float = hp(0.01, "[code] of the Q-functions' first layer, before its norm", ge=0, lt=1)
    init_std: float = hp(0.02, "[code] normal kernels; the last of reward and Q are zero", gt=0)

    # values as two-hot vectors in symlog space
    bins: int = hp(101, "[code]", ge=3)
    bins_limit: float = hp(10.0, "[code] of symlog(value)", gt=0)

    # learning
    rho: float = hp(0.5, "[code] weight of one step further", gt=0, le=1)
    consistency: float = hp(20.0, "[code] coefficient", ge=0)
    reward: float = hp(0.1, "[code] coefficient", ge=0)
    value: float = hp(0.1, "[code] coefficient", ge=0)
    lr: float = hp(3e-4, "[code]", gt=0)
    encoder_lr_factor: float = hp(0.3, "[code]", gt=0)
    clip: float = hp(20.0, "[code] gradient norm of the model's networks together, and of the policy", gt=0)
    policy_epsilon: float = hp(1e-5, "[code] Adam's, of the policy alone", gt=0)
    rate: float = hp(0.01, "[code] new fraction: target Q-functions, and the scale of values", gt=0, le=1)
    entropy: float = hp(1e-4, "[code] coefficient", ge=0)
    entropy_form: Literal["scaled", "published"] = hp(
        "scaled", "[code] |A| times the Gaussian's; published: the tanh correction beside it, unscaled (baselines B.1)"
    )
    discount: float | None = hp(None, "[code] by the episode's length: clip((T/5 - 1) / (T/5), .95, .995)", gt=0, lt=1)

    # planning
    planner: bool = hp(True, "[code] mpc; off: the policy acts", strict=True)
    plan_iterations: int | None = hp(None, "[code] 6, and 8 from 20 action dimensions on", ge=1)
    plan_samples: int = hp(512, "[code] candidates, those of the policy included", ge=32, multiple_of=32)
    plan_elites: int = hp(64, "[code]", ge=1)
    plan_priors: int = hp(24, "[code] candidates that the policy makes", ge=0)
    plan_std_min: float = hp(0.05, "[code]", gt=0)
    plan_std_max: float = hp(2.0, "[code] and where every search starts", gt=0)
    plan_temperature: float = hp(0.5, "[code] multiplies values", gt=0)

    @model_validator(mode="after")
    def _settings_that_go_together(self) -> TDMPC2Config:
        if self.latent % self.simnorm_group:
            raise ValueError(f"simnorm_group, {self.simnorm_group}: must divide latent, {self.latent}")
        if not max(self.plan_elites, self.plan_priors) <= self.plan_samples:
            raise ValueError(f"plan_samples, {self.plan_samples}: must be at least plan_elites and plan_priors")
        if self.plan_std_min > self.plan_std_max:
            raise ValueError(f"plan_std_min, {self.plan_std_min:g}: must be at most plan_std_max")
        return self

    def iterations(self, action_size: int) -> int:
        """Return the planner's iterations."""
        return self.plan_iterations or (8 if action_size >= 20 else 6)

    def discount_of(self, episode_steps: int) -> float:
        """Return gamma for episodes of so many agent steps (`baselines` B.3)."""
        part = episode_steps / 5
        return self.discount or min(max((part - 1) / part, 0.95), 0.995)

    def label(self) -> str:
        """Return what tells TD-MPC2's arms apart: whether it plans."""
        return self.name if self.planner else f"{self.name}-policy"

    # -- cost ----------------------------------------------------------------------------------------------------

    def _multiply_adds(self, obs_size: int, action_size: int) -> dict[str, int]:
        """Return the kernel entries of each network; of one Q-function."""
        w, za = self.width, self.latent + action_size
        return {
            "encoder": obs_size * self.encoder_width + self.encoder_width * self.latent,
            "dynamics": za * w + w * w + w * self.latent,
            "head": za * w + w * w + w * self.bins,  # of reward or value
            "actor": self.latent * w + w * w + w * 2 * action_size,
        }

    def update_flops(self, obs_size: int, action_size: int) -> float:
        """Return operations of one update, two per multiply-add.

        With E, D, R = Q, P the multiply-adds per row of encoder, dynamics, reward or one Q-function, and policy, of H
        steps: (H + 3) E, the first observation differentiated; H (P + 2 Q) for targets; 3 H (D + R + n Q) for the
        rollout and what is read from it; (H + 1) (3 P + 4 Q) for the policy, whose step goes back through two
        Q-functions to the action. Less the derivatives by what does not learn: observations, actions, latents.
        """
        n, h, w = self._multiply_adds(obs_size, action_size), self.horizon, self.width
        heads = 1 + self.critics
        rows = (h + 3) * n["encoder"] + h * (n["actor"] + 2 * n["head"]) + 3 * h * (n["dynamics"] + heads * n["head"])
        rows += (h + 1) * (3 * n["actor"] + 4 * n["head"])
        unused = obs_size * self.encoder_width + h * (1 + heads) * action_size * w + (h + 1) * 3 * self.latent * w
        return 2.0 * self.batch_size * (rows - unused)

    def plan_flops(self, obs_size: int, action_size: int) -> float:
        """Return operations of one search: the policy's rollouts, and every candidate's value in every iteration."""
        n, h = self._multiply_adds(obs_size, action_size), self.horizon
        candidate = h * (n["dynamics"] + n["head"]) + n["actor"] + 2 * n["head"]
        candidates = self.iterations(action_size) * self.plan_samples
        return 2.0 * (candidates * candidate + self.plan_priors * h * (n["dynamics"] + n["actor"]) + n["encoder"])

    def plan_work(self, steps: int, obs_size: int, action_size: int) -> Work:
        """Return the searches of so many agent steps."""
        return Work("plan", self.plan_flops(obs_size, action_size) / 1e9, steps)

    def learning_work(self, steps: int, obs_size: int, action_size: int) -> list[Work]:
        """Return the updates of `steps` agent steps, without those where learning begins, and the searches."""
        work = [self.update_work(steps * self.updates_per_step, obs_size, action_size)]
        return [*work, self.plan_work(steps, obs_size, action_size)] if self.planner else work

    def parameters(self, obs_size: int, action_size: int) -> int:
        """Return the kernels of all networks, with the target Q-functions."""
        n = self._multiply_adds(obs_size, action_size)
        return n["encoder"] + n["dynamics"] + (1 + 2 * self.critics) * n["head"] + n["actor"]
