"""Meta-World 3.1.1: one robot arm, fifty manipulation tasks, goals drawn anew for every episode."""

import logging
import pickle
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dynarep.envs.base import EnvError, FloatArray, MuJoCo, Observation, Snapshot, load

PREFIX = "metaworld-"  # of our task names: "metaworld-assembly" is the library's "assembly-v3"
FRAME_BEFORE = slice(18, 36)  # of an observation: hand, gripper and objects as they were one frame earlier


class MetaWorld(MuJoCo):
    """A task of Meta-World with the goal in its observation and the library's own ("v2") reward, 0 to 10 a frame.

    The conventions are those that TD-MPC2 and BRO share: positions of object and goal drawn from the task's box at each
    reset, here from the episode's seed; 200 frames an episode, not the library's 500; no termination, not even on
    success. `Step.success` is the library's flag after the last frame of an agent step: it can switch off again.

    A simulation that blows up raises, where the library hides it behind a reward of 0.
    """

    reports_success = True

    _EPISODE_FRAMES: ClassVar[int] = 200  # TD-MPC2 and BRO
    _EDITED: ClassVar[tuple[str, ...]] = ("body_pos", "site_pos")  # arrays of the model that resets place things with
    # Attributes of these modules' types are no state: spaces, simulator, renderer; the generator is for resets alone.
    _LEFT_OUT: ClassVar[tuple[str, ...]] = ("gymnasium.", "mujoco.", "numpy.random")

    def __init__(self, task: str, action_repeat: int, reward_scale: float) -> None:
        super().__init__(task, action_repeat, reward_scale)
        name = f"{task.removeprefix(PREFIX)}-v3-goal-observable"
        self._env = load("metaworld.env_dict").ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[name](seed=0)
        self._env._freeze_rand_vec = False  # a new draw at every reset,
        self._env.seeded_rand_vec = True  # from the environment's own generator
        self._model, self._data = self._env.model, self._env.data
        self._mujoco.set_mju_user_warning(logging.getLogger(__name__).warning)  # not a MUJOCO_LOG.TXT where we stand
        kinds = self._mujoco.mjtWarning
        self._bad = [int(kind) for kind in (kinds.mjWARN_BADQPOS, kinds.mjWARN_BADQVEL, kinds.mjWARN_BADQACC)]
        self._computed = [getattr(self._data, name) for name in ("xpos", "xquat", "site_xpos", "geom_xpos")]
        self.episode_frames = self._EPISODE_FRAMES
        self._low, self._high = -np.ones(4), np.ones(4)
        self.action_size, self.obs_size = 4, 39

    def expert(self) -> Callable[[Observation], FloatArray]:
        """Return the library's scripted policy, clipped; it sees the observation alone."""
        policy = load("metaworld.policies").ENV_POLICY_MAP[f"{self.task.removeprefix(PREFIX)}-v3"]()

        def act(obs: Observation) -> FloatArray:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*may be too high")
                return np.clip(np.asarray(policy.get_action(obs.astype(np.float64)), np.float64), -1.0, 1.0)

        return act

    def _begin(self, seed: int) -> None:
        # The library's reset ignores a seed, and resets twice: nothing of the last episode is left.
        self._env.seed(seed)
        self._obs, _ = self._env.reset()
        edited = {name: getattr(self._model, name).copy() for name in self._EDITED}
        self._fixtures: Mapping[str, npt.NDArray[Any]] = edited  # shared by the snapshots of the episode

    def _advance(self, control: FloatArray) -> tuple[float, bool, bool]:
        self._obs, reward, _, _, info = self._env.step(control.astype(self._env.action_space.dtype))
        # MuJoCo silently restarts a simulation that blew up; only its counters tell.
        if self._data.warning.number[self._bad].any():
            raise self._blow_up("qpos, qvel or qacc is not finite or too large")
        self._success = bool(info["success"])
        return float(reward), False, self._frame + 1 >= self.episode_frames

    def _observe(self) -> Observation:
        return np.asarray(self._obs, np.float32)

    def _capture(self) -> dict[str, Any]:
        # Without arrays that show what MuJoCo has just computed (`init_left_pad`, `_target_pos` of some tasks): they
        # move with the simulation, and rewards count on it.
        kept = {}
        for name, value in vars(self._env).items():
            shown = isinstance(value, np.ndarray) and any(np.may_share_memory(value, array) for array in self._computed)
            if not shown and not type(value).__module__.startswith(self._LEFT_OUT):
                kept[name] = value
        try:
            return {"model": self._fixtures, "attributes": pickle.dumps(kept)}
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            hint = "take another task for measurements that restore the simulator, or make the attribute picklable"
            raise EnvError(f"{self.task} keeps state that a snapshot cannot hold ({error}): {hint}") from error

    def _recover(self, snapshot: Snapshot) -> None:
        self._fixtures = snapshot.model
        for name, array in snapshot.model.items():
            getattr(self._model, name)[...] = array
        vars(self._env).update(pickle.loads(snapshot.attributes))
        self._set_physics(snapshot)  # a step computes the rest before it looks at it
