"""Random transitions, and the store that spares the simulator: it must never change a number."""

import numpy as np
import pytest

from dynarep import cache, envs, fingerprint, records
from dynarep.cache import cached_in
from dynarep.configs import EnvironmentConfig
from dynarep.protocols.collect import FIELDS, collect, random_transitions

TASK = EnvironmentConfig(suite="gymnasium", task="InvertedPendulum-v4")  # ends every few steps
STEPS = 40


def same(a, b) -> bool:
    arrays = [[getattr(data, name) for name in FIELDS] for data in (a, b)]
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(*arrays, strict=True))


@pytest.fixture
def made(monkeypatch):
    """The environments made."""
    seen, make = [], envs.make
    monkeypatch.setattr(envs, "make", lambda *a, **k: (seen.append(k or a), make(*a, **k))[1])
    return seen


def test_random_transitions_are_the_seeds_own_and_counted():
    env = envs.make("dmc", "walker-walk", action_repeat=2)
    a, b, c = (random_transitions(env, seed, 30) for seed in (1, 2, 1))
    assert len(a) == 30
    assert same(a, c)
    assert not np.array_equal(a.action, b.action)
    np.testing.assert_array_equal(a.next_obs[:-1], a.obs[1:])  # one episode
    assert not a.ended.any()


def test_collecting_is_acting_at_random_with_one_environment_for_all_seeds(made):
    data = collect(TASK, [3, 4], STEPS)
    assert len(made) == 1
    env = envs.from_config(TASK)
    assert all(same(own, random_transitions(env, seed, STEPS)) for own, seed in zip(data, (3, 4), strict=True))
    assert data[0].terminated.any()
    assert not data[0].snapshots


REACH = EnvironmentConfig(suite="metaworld", task="metaworld-reach")
TURNS = {"limit": 20, "expert_noise": 0.1}


def test_the_expert_acts_in_every_second_episode_and_the_others_stay_as_they_were():
    env = envs.from_config(REACH)
    alone, turns = random_transitions(env, 1, 60, limit=20), random_transitions(env, 1, 60, **TURNS)
    for part in (slice(20), slice(40, 60)):
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(alone, name)[part], getattr(turns, name)[part], name)
    other = slice(20, 40)
    np.testing.assert_array_equal(alone.obs[20], turns.obs[20])  # the same goal
    act = env.expert()
    scripted = np.array([act(obs) for obs in turns.obs[other]])
    free = np.abs(turns.action[other]) < 1
    assert 0.05 < (turns.action[other] - scripted)[free].std() < 0.15
    assert np.abs(turns.action).max() == 1  # clipped
    exact = random_transitions(env, 1, 40, limit=20, expert_noise=0.0)
    np.testing.assert_array_equal(exact.action[other], np.array([act(obs) for obs in exact.obs[other]], np.float32))


def test_noise_of_the_expert_is_the_seeds_own_and_another_files(tmp_path, made):
    with cached_in(tmp_path):
        first, second = collect(REACH, [1, 2], 30, **TURNS)
        again = collect(REACH, [2], 30, **TURNS)[0]
        assert len(made) == 1
        assert same(second, again)
        assert same(first, random_transitions(envs.from_config(REACH), 1, 30, **TURNS))
        collect(REACH, [1], 30, limit=20, expert_noise=0.2)
        collect(REACH, [1], 30, limit=20)
    assert len(made) == 4
    assert not np.array_equal(first.action[20:], second.action[20:])


def test_what_is_cached_comes_back_to_the_byte_and_without_a_simulator(tmp_path, made):
    fresh = collect(TASK, [3, 4], STEPS)
    with cached_in(tmp_path / "cache"):
        assert all(map(same, collect(TASK, [3], STEPS), fresh))
        assert all(map(same, collect(TASK, [3, 4], STEPS), fresh))  # one of them was there
        assert len(made) == 3
        assert all(map(same, collect(TASK, [4, 3], STEPS), fresh[::-1]))
        assert len(made) == 3
        assert all(data.action.flags.writeable for data in collect(TASK, [3], STEPS))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_nothing_is_cached_outside_the_context_or_without_a_folder(tmp_path, made):
    with cached_in(tmp_path), cached_in(None):
        collect(TASK, [3], STEPS)
    with cached_in(tmp_path):
        pass
    collect(TASK, [3], STEPS)
    assert len(made) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "seed", "steps"),
    [
        ({}, 4, STEPS),
        ({}, 3, STEPS + 1),
        ({"reward_scale": 2.0}, 3, STEPS),
        ({"action_repeat": 2}, 3, STEPS),
        ({"task": "Hopper-v4"}, 3, STEPS),
        ({"zero_contact_forces": True}, 3, STEPS),
    ],
)
def test_other_data_are_other_files(tmp_path, made, change, seed, steps):
    with cached_in(tmp_path):
        collect(TASK, [3], STEPS)
        collect(TASK.model_copy(update=change), [seed], steps)
    assert len(made) == 2
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["of_modules", "of_lock", "versions", "cpu_model"])
def test_data_of_other_code_packages_or_processors_are_not_used(tmp_path, made, monkeypatch, name):
    with cached_in(tmp_path):
        collect(TASK, [3], STEPS)
        monkeypatch.setattr(fingerprint if name.startswith("of") else records, name, lambda *_: "another")
        collect(TASK, [3], STEPS)
    assert len(made) == 2


def test_the_code_that_decides_the_data_is_covered(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(fingerprint, "of_modules", lambda modules: (seen.append(modules), "hash")[1])
    cache.Folder(tmp_path).path({})
    assert {f"dynarep.{name}" for name in ("envs", "envs.base", "protocols.collect", "streams", "configs")} <= {
        *seen[0]
    }
    assert not any(name.startswith(("dynarep.agents", "dynarep.cache", "dynarep.records")) for name in seen[0])


@pytest.mark.parametrize("damage", ["empty", "torn", "flipped", "not one", "another array", "a pickle", "a folder"])
def test_a_damaged_file_is_collected_again_and_mended(tmp_path, made, damage):
    with cached_in(tmp_path):
        fresh = collect(TASK, [3], STEPS)[0]
        (file,) = tmp_path.iterdir()
        whole = file.read_bytes()
        middle = whole.index(fresh.obs.tobytes()) + 5
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        content = {"empty": b"", "torn": whole[: len(whole) // 2], "flipped": flipped, "not one": b"hello" * 99}
        if damage in content:
            file.write_bytes(content[damage])
        elif damage == "a folder":
            file.unlink()
            file.mkdir()
        elif damage == "a pickle":
            np.savez(file, **{name: np.array([{}] * STEPS) for name in FIELDS})
        else:
            np.savez(file, **{name: getattr(fresh, name)[1:] for name in FIELDS})
        assert same(collect(TASK, [3], STEPS)[0], fresh)
        assert len(made) == 2
        if damage != "a folder":
            assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").touch()
    with cached_in(tmp_path / "file"):
        assert len(collect(TASK, [3], STEPS)[0]) == STEPS


def test_a_limit_ends_episodes_without_a_true_end_and_the_next_one_starts_afresh(tmp_path, made):
    cheetah = EnvironmentConfig(suite="gymnasium", task="HalfCheetah-v5")  # has no true end
    (data,), (unlimited,) = collect(cheetah, [3], STEPS, limit=15), collect(cheetah, [3], STEPS)
    assert np.flatnonzero(data.ended).tolist() == [14, 29]
    assert not data.terminated.any()
    assert not unlimited.ended.any()
    assert data.obs[:15].tobytes() == unlimited.obs[:15].tobytes()
    assert data.obs[15].tobytes() != data.next_obs[14].tobytes()
    with cached_in(tmp_path):  # neither is taken for the other
        assert not collect(cheetah, [3], STEPS)[0].ended.any()
        assert collect(cheetah, [3], STEPS, limit=15)[0].ended.any()


def test_a_true_end_before_the_limit_starts_the_count_again():
    (data,) = collect(TASK, [3], STEPS, limit=6)
    ends = np.flatnonzero(data.ended)
    lengths, true = np.diff([-1, *ends]), data.terminated[ends]
    assert true.any()
    assert not true.all()
    assert (lengths[~true] == 6).all()
    assert (lengths[true] <= 6).all()
