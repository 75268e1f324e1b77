"""The ring buffer against plain Python lists, and draws that belong to their seed."""

import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynarep.replay import Part, Replay, draw, spread

FIELDS: dict[str, tuple[int, ...]] = {"obs": (2,), "reward": ()}


class Model:
    """What the buffer should be: per seed, a list of rows with a place to write next."""

    def __init__(self, seeds: int, capacity: int) -> None:
        self.rows: list[list[float | None]] = [[None] * capacity for _ in range(seeds)]
        self.next = 0

    def add(self, values: np.ndarray) -> None:
        for column in range(values.shape[1]):
            for row, value in zip(self.rows, values[:, column], strict=True):
                row[self.next] = float(value)
            self.next = (self.next + 1) % len(self.rows[0])

    @property
    def size(self) -> int:
        return sum(value is not None for value in self.rows[0])


def rows(values: np.ndarray) -> dict[str, np.ndarray]:
    """Transitions that a number tells apart; the observation holds it twice."""
    return {"obs": np.stack([values, -values], axis=-1), "reward": values}


def batches(seeds: int, sizes: list[int]) -> list[np.ndarray]:
    starts = np.cumsum([0, *sizes])
    every = np.arange(starts[-1], dtype=np.float32) + 1000 * np.arange(seeds, dtype=np.float32)[:, None]
    return [every[:, start:end] for start, end in pairwise(starts)]


def check(buffer: Replay, model: Model) -> None:
    assert buffer.size == model.size
    indices = torch.arange(buffer.size).expand(len(model.rows), -1)
    found = buffer.rows(indices)
    expected = torch.tensor([row[: model.size] for row in model.rows])
    torch.testing.assert_close(found["reward"], expected, rtol=0, atol=0)
    torch.testing.assert_close(found["obs"], torch.stack([expected, -expected], -1), rtol=0, atol=0)


@st.composite
def histories(draw: Any) -> tuple[int, int, list[int]]:
    capacity = draw(st.integers(1, 7))
    return draw(st.integers(1, 3)), capacity, draw(st.lists(st.integers(1, capacity), min_size=1, max_size=9))


@settings(deadline=None)
@given(histories())
def test_the_oldest_rows_are_overwritten_and_no_others(history):
    seeds, capacity, sizes = history
    buffer, model = Replay(FIELDS, seeds, capacity), Model(seeds, capacity)
    for values in batches(seeds, sizes):
        buffer.add(rows(values))
        model.add(values)
        check(buffer, model)
    newest = np.concatenate(batches(seeds, sizes), axis=1)[:, -capacity:]
    for seed, row in enumerate(model.rows):
        assert sorted(value for value in row if value is not None) == sorted(newest[seed])


@settings(deadline=None)
@given(histories(), st.integers(0, 9))
def test_a_restored_buffer_goes_on_like_the_old_one(history, at):
    seeds, capacity, sizes = history
    buffer, model = Replay(FIELDS, seeds, capacity), Model(seeds, capacity)
    for index, values in enumerate(batches(seeds, sizes)):
        if index == at:
            old, buffer = buffer, Replay(FIELDS, seeds, capacity)
            buffer.load(old.state())
            check(buffer, model)
        buffer.add(rows(values))
        model.add(values)
    check(buffer, model)
    assert buffer.state().keys() == Replay(FIELDS, seeds, capacity).state().keys()


def test_a_state_passes_through_a_checkpoint(tmp_path):
    buffer, model = Replay(FIELDS, 2, 5), Model(2, 5)
    for values in batches(2, [3, 4]):
        buffer.add(rows(values))
        model.add(values)
    torch.save(buffer.state(), tmp_path / "state")
    restored = Replay(FIELDS, 2, 5)
    restored.load(torch.load(tmp_path / "state", weights_only=True))
    check(restored, model)


@settings(deadline=None)
@given(st.data())
def test_rows_that_are_not_kept_leave_no_gap_and_seeds_fill_at_their_own_pace(data):
    seeds, capacity = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    buffer, lists = Replay(FIELDS, seeds, capacity), [[] for _ in range(seeds)]
    sizes = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=6))
    for values in batches(seeds, sizes):
        flags = st.lists(st.booleans(), min_size=values.size, max_size=values.size)
        keep = torch.tensor(data.draw(flags)).view(values.shape) if data.draw(st.booleans()) else None
        buffer.add(rows(values), keep)
        for s, line in enumerate(lists):
            line += values[s, keep[s].numpy() if keep is not None else slice(None)].tolist()
        if data.draw(st.booleans()):
            old, buffer = buffer, Replay(FIELDS, seeds, capacity)
            buffer.load(old.state())
        assert buffer.sizes.tolist() == [min(len(line), capacity) for line in lists]
        assert buffer.size == min(buffer.sizes.tolist())
        for s, line in enumerate(lists):
            stored = buffer.data["reward"][s].tolist()
            for place in range(min(len(line), capacity)):  # the newest row that belongs there
                assert stored[place] == line[place + (len(line) - 1 - place) // capacity * capacity]
                assert buffer.data["obs"][s, place].tolist() == [stored[place], -stored[place]]


def test_a_checkpoint_holds_the_filled_rows_alone():
    buffer = Replay(FIELDS, 2, 1000)
    buffer.add(rows(batches(2, [5])[0]), torch.tensor([[True] * 5, [True, False] * 2 + [False]]))
    assert buffer.state()["data/obs"].shape == (2, 5, 2)
    assert buffer.sizes.tolist() == [5, 2]


EMPTY = """
import dynarep, numpy, psutil
from dynarep.replay import Replay
before = psutil.Process().memory_info().rss
buffer = Replay({"obs": (100,)}, 2, 500_000)
buffer.add({"obs": numpy.ones((2, 10, 100), numpy.float32)})
print(psutil.Process().memory_info().rss - before)
assert not buffer.data["obs"][:, 10:20].any()
"""


def test_an_empty_buffer_takes_no_memory():
    """A synthetic buffer of the reference's size would be 0.6 GB per seed on humanoid tasks, used or not.

    In a process of its own: where others have freed as much, the C library hands that out again, and clears it.
    """
    printed = subprocess.run([sys.executable, "-c", EMPTY], check=True, capture_output=True, text=True).stdout
    assert int(printed) < 2**25


def test_rows_of_any_shape_come_from_their_own_seed():
    buffer = Replay(FIELDS, 3, 4)
    buffer.add(rows(batches(3, [4])[0]))
    indices = torch.tensor([[[0, 3], [1, 1]]] * 3)
    found = buffer.rows(indices)
    assert found["reward"].shape == (3, 2, 2)
    assert found["obs"].shape == (3, 2, 2, 2)
    torch.testing.assert_close(found["reward"] // 1000, torch.arange(3.0).view(3, 1, 1).expand(3, 2, 2))
    torch.testing.assert_close(found["reward"] % 1000, indices.float())


def test_a_full_buffer_takes_its_capacity_at_once():
    buffer, model = Replay(FIELDS, 1, 3), Model(1, 3)
    for values in batches(1, [2, 3]):
        buffer.add(rows(values))
        model.add(values)
    check(buffer, model)


def test_more_rows_than_fit_are_refused_and_change_nothing():
    """Written one over the other, they would be lost without a word."""
    buffer = Replay(FIELDS, 1, 3)
    buffer.add(rows(batches(1, [2])[0]))
    before = {name: values.clone() for name, values in buffer.data.items()}
    with pytest.raises(ValueError, match="cannot add 4 rows to a buffer of 3"):
        buffer.add(rows(batches(1, [4])[0]))
    assert buffer.size == 2
    assert all(torch.equal(buffer.data[name], before[name]) for name in before)


@settings(deadline=None)
@given(
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
    size=st.integers(1, 50),
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
)
def test_each_seed_draws_with_its_own_generator(seeds, size, shape):
    """Otherwise its minibatches would depend on the block that it runs in."""
    generators = [np.random.default_rng(seed) for seed in seeds]
    drawn = [draw(generators, size, shape) for _ in range(2)]
    assert drawn[0].dtype == torch.int64
    for row, seed in enumerate(seeds):
        alone = np.random.default_rng(seed)
        for turn in drawn:
            assert turn.shape == (len(seeds), *shape)
            np.testing.assert_array_equal(turn[row].numpy(), alone.integers(size, size=shape))


def test_seeds_with_other_sizes_draw_from_their_own_rows():
    generators, sizes = [np.random.default_rng(seed) for seed in range(3)], [1, 10, 300]
    drawn = draw(generators, sizes, (500,))
    assert [int(row.max()) + 1 for row in drawn] == pytest.approx(sizes, abs=3)
    np.testing.assert_array_equal(drawn[1].numpy(), np.random.default_rng(1).integers(10, size=500))


def test_every_row_is_drawn_equally_often():
    counts = np.bincount(draw([np.random.default_rng(0)], 10, (20_000,))[0].numpy(), minlength=10)
    assert len(counts) == 10
    assert np.abs(counts / 2000 - 1).max() < 0.1


# -- parts and even draws ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data())
def test_a_part_has_the_chosen_rows_that_are_stored_and_no_others(data):
    seeds, steps = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    flags = [data.draw(st.lists(st.booleans(), min_size=steps, max_size=steps)) for _ in range(seeds)]
    buffer = Replay(FIELDS, seeds, steps)
    part = Part(buffer, [np.flatnonzero(own) for own in flags])
    assert (part.sizes.tolist(), part.size) == ([0] * seeds, 0)
    for stored, values in enumerate(batches(seeds, [1] * steps), 1):
        buffer.add(rows(values))
        own = [[row for row in range(stored) if flags[k][row]] for k in range(seeds)]
        assert part.sizes.tolist() == [len(line) for line in own]
        assert part.size == min(len(line) for line in own)
        if part.size:
            indices = torch.stack([torch.arange(part.size).flip(0)[:, None].repeat(1, 2)] * seeds)
            expected = torch.tensor([line[: part.size][::-1] for line in own]).unsqueeze(-1).expand(-1, -1, 2)
            assert torch.equal(part.absolute(indices), expected)
            assert torch.equal(part.rows(indices)["reward"], expected + 1000.0 * torch.arange(seeds).view(-1, 1, 1))


def test_a_part_of_rows_that_will_be_overwritten_is_refused():
    with pytest.raises(ValueError, match="a replay of 4 does not keep"):
        Part(Replay(FIELDS, 1, 4), [np.array([1, 4])])


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3), count=st.integers(1, 130))
def test_even_draws_take_every_row_equally_often_and_are_the_seeds_own(sizes, count):
    drawn = spread([np.random.default_rng(seed) for seed in range(len(sizes))], sizes, count)
    assert drawn.dtype == torch.int64
    for seed, (line, size) in enumerate(zip(drawn, sizes, strict=True)):
        times = np.bincount(line.numpy(), minlength=size)
        assert len(times) == size
        assert set(times) <= {count // size, -(-count // size)}
        np.testing.assert_array_equal(spread([np.random.default_rng(seed)], [size], count)[0], line)


def test_the_rows_that_an_even_draw_takes_once_more_are_chosen_at_random():
    counts = np.bincount(spread([np.random.default_rng(0)] * 2000, [10] * 2000, 3).flatten().numpy(), minlength=10)
    assert np.abs(counts / 600 - 1).max() < 0.2
