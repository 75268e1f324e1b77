"""The DeepMind Control suite."""

import inspect
import math
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dynarep.envs.base import EnvError, FloatArray, MuJoCo, Observation, Snapshot, load, unknown

_UNLIMITED_FRAMES = 1000  # ours: an episode of lqr, the one domain without a time limit


class ControlSuite(MuJoCo):
    """A task of the DeepMind Control suite, stepped through its public physics and task objects.

    The rewards and observations of `control.Environment`, bit by bit. Differences (ours): a task's end and the time
    limit are told apart; lqr has neither control bounds nor a time limit, here they are [-1, 1] and 1000 frames, and
    its springs, drawn when it is loaded, are the same in every process. Observation entries named in `dropped` are left
    out.
    """

    def __init__(self, task: str, action_repeat: int, reward_scale: float, dropped: Sequence[str] = ()) -> None:
        super().__init__(task, action_repeat, reward_scale)
        suite = load("dm_control.suite")
        self._physics_error: type[RuntimeError] = load("dm_control.rl.control").PhysicsError
        domain, name = task.split("-", 1)
        env = suite.load(domain, name, task_kwargs={"random": 0})  # `reset` seeds anew: 0 matters to lqr's model only
        self._physics, self._task = env.physics, env.task
        self._model, self._data = env.physics.model.ptr, env.physics.data.ptr
        self._sub_steps = round(env.control_timestep() / env.physics.timestep())
        limit = inspect.signature(getattr(suite, domain).SUITE[name]).parameters["time_limit"].default
        # The expression of control.Environment, so that rounding cannot make the episodes differ by a frame.
        self.episode_frames = math.ceil(limit / env.control_timestep()) if limit < math.inf else _UNLIMITED_FRAMES
        spec, unbounded = env.action_spec(), self._mujoco.mjMAXVAL
        self._low = np.where(spec.minimum <= -unbounded, -1.0, spec.minimum)
        self._high = np.where(spec.maximum >= unbounded, 1.0, spec.maximum)
        self.action_size = self._low.size
        self._dropped, entries = frozenset(dropped), env.observation_spec()
        for entry in dropped:
            if entry not in entries:
                raise unknown(f"observation entry of {task}", entry, entries)
        self.obs_size = sum(math.prod(array.shape) for entry, array in entries.items() if entry not in self._dropped)
        if not self.obs_size:
            raise EnvError(f"{task}: drop_observations leaves nothing to observe: keep one of {', '.join(entries)}")
        # Tasks write their target into the model (geom_pos, site_pos, wrap_prm, hfield_data ...). Assets are left out:
        # no task writes them, and dog has 90 MB of them.
        names = [name for name in dir(self._model) if not name.startswith(("_", "tex_", "mesh_", "skin_", "bvh_"))]
        views = {name: getattr(self._model, name) for name in names}
        self._views = {name: view for name, view in views.items() if isinstance(view, np.ndarray)}
        self._loaded = {name: array.copy() for name, array in self._views.items()}
        self._written: Mapping[str, npt.NDArray[Any]] = {}
        self._attributes = b""

    def _begin(self, seed: int) -> None:
        # The simulator's own reset computes contacts and a warm start from the model: no trace of the last target.
        self._write_model({})
        self._task.random.seed(seed)
        try:
            with self._physics.reset_context():
                self._task.initialize_episode(self._physics)
        except RuntimeError as error:  # PhysicsError; no collision-free start; no renderer (quadruped-escape)
            hint = (
                " Its terrain goes through a renderer: set MUJOCO_GL=egl or osmesa." if "OpenGL" in str(error) else ""
            )
            raise EnvError(f"{self.task} cannot start an episode with seed {seed}: {error}{hint}") from error
        finally:
            changed = [name for name, array in self._views.items() if array.tobytes() != self._loaded[name].tobytes()]
            self._written = {name: self._views[name].copy() for name in changed}

    def _write_model(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        if arrays is not self._written:
            for name in {*self._written, *arrays}:
                self._views[name][...] = arrays.get(name, self._loaded[name])
            self._written = arrays

    def _advance(self, control: FloatArray) -> tuple[float, bool, bool]:
        try:
            self._task.before_step(control, self._physics)
            self._physics.step(self._sub_steps)
        except self._physics_error as error:
            raise self._blow_up(str(error)) from error
        self._task.after_step(self._physics)
        reward = float(self._task.get_reward(self._physics))
        if self._frame + 1 >= self.episode_frames:  # goes before the task's own end, as in control.Environment
            return reward, False, True
        discount = self._task.get_termination(self._physics)
        return reward, discount == 0, discount is not None and discount != 0

    def _observe(self) -> Observation:
        entries = self._task.get_observation(self._physics).items()
        kept = [np.ravel(values) for entry, values in entries if entry not in self._dropped]
        flat: Observation = np.concatenate(kept).astype(np.float32)
        return flat

    def _capture(self) -> dict[str, Any]:
        # The generator is left out: no task of the suite draws a number after its reset.
        kept = {name: value for name, value in vars(self._task).items() if name != "_random"}
        try:
            attributes = pickle.dumps(kept)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            hint = "take another task for measurements that restore the simulator, or make the attribute picklable"
            raise EnvError(f"{self.task} keeps state that a snapshot cannot hold ({error}): {hint}") from error
        if attributes != self._attributes:
            self._attributes = attributes  # otherwise the bytes of the last snapshot are shared
        return {"model": self._written, "attributes": self._attributes}

    def _recover(self, snapshot: Snapshot) -> None:
        self._write_model(snapshot.model)
        vars(self._task).update(pickle.loads(snapshot.attributes))
        self._set_physics(snapshot)
        # dm_control's step begins with mj_step2 and expects what mj_step1 computes. Not mj_forward: it overwrites the
        # warm start, and the next step would differ in its last bits.
        self._mujoco.mj_step1(self._model, self._data)
