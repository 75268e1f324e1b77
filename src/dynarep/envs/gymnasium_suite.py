"""Gymnasium's MuJoCo tasks."""

import logging
import math
import warnings
from typing import Any, ClassVar

import numpy as np

from dynarep.envs.base import FloatArray, MuJoCo, Observation, Snapshot, load


class Gymnasium(MuJoCo):
    """A MuJoCo task of Gymnasium: `gymnasium.make(task).unwrapped` with the time limit of its registration.

    With `zero_contact_forces`, the last `_CONTACT_FORCES[task]` entries of the observation are 0, as mujoco-py with
    MuJoCo above 2.0 most likely gave them to STFL (FTFL section 6.2). They are live in Gymnasium.
    """

    _CONTACT_FORCES: ClassVar[dict[str, int]] = {"Humanoid-v4": 14 * 6, "Humanoid-v5": 13 * 6, "Ant-v5": 13 * 6}

    # Ant's and Humanoid's rewards read these before they step. Recomputing them would not do: after mj_step they are
    # one sub-step behind the positions.
    _LAGGING: ClassVar[tuple[str, ...]] = ("xpos", "xipos")

    def __init__(self, task: str, action_repeat: int, reward_scale: float, zero_contact_forces: bool = False) -> None:
        super().__init__(task, action_repeat, reward_scale)
        gymnasium = load("gymnasium")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date")  # v4 is meant
            self._env = gymnasium.make(task, disable_env_checker=True).unwrapped
        self._zeroed = self._CONTACT_FORCES.get(task, 0) if zero_contact_forces else 0
        self._model, self._data = self._env.model, self._env.data
        self._mujoco.set_mju_user_warning(logging.getLogger(__name__).warning)  # not a MUJOCO_LOG.TXT where we stand
        kinds = self._mujoco.mjtWarning
        self._bad = [int(kind) for kind in (kinds.mjWARN_BADQPOS, kinds.mjWARN_BADQVEL, kinds.mjWARN_BADQACC)]
        self.episode_frames = int(gymnasium.spec(task).max_episode_steps)
        box = self._env.action_space
        self._low, self._high = box.low.astype(np.float64), box.high.astype(np.float64)
        self.action_size, self.obs_size = math.prod(box.shape), math.prod(self._env.observation_space.shape)

    def _begin(self, seed: int) -> None:
        self._obs: FloatArray = self._env.reset(seed=seed)[0]

    def _advance(self, control: FloatArray) -> tuple[float, bool, bool]:
        self._obs, reward, terminated, _, _ = self._env.step(control.astype(self._env.action_space.dtype))
        # MuJoCo silently restarts a simulation that blew up; only its counters tell.
        if self._data.warning.number[self._bad].any():
            raise self._blow_up("qpos, qvel or qacc is not finite or too large")
        return float(reward), bool(terminated), self._frame + 1 >= self.episode_frames

    def _observe(self) -> Observation:
        obs = self._obs.astype(np.float32)
        obs[obs.size - self._zeroed :] = 0.0
        return obs

    def _capture(self) -> dict[str, Any]:
        return {"derived": {name: getattr(self._data, name).copy() for name in self._LAGGING}}

    def _recover(self, snapshot: Snapshot) -> None:
        self._set_physics(snapshot)
        for name, array in snapshot.derived.items():
            getattr(self._data, name)[...] = array
