"""What a job asks of a cluster: enough, more at each attempt, never more than the cluster allows."""

from types import SimpleNamespace

import pytest

from dynarep import plan
from dynarep.errors import UserError
from dynarep.experiment import find, load_all
from dynarep.resources import Place


@pytest.fixture(scope="module")
def jobs():
    return find(load_all(), "A").jobs("paper")[:2]


def test_a_job_has_twice_the_time_it_is_expected_to_take_and_more_when_it_failed(jobs):
    runtime = Place(hours=10**6).resources(jobs)["runtime"]
    expected = sum(map(plan.job_seconds, jobs)) / 60
    assert 2 * expected < runtime({}, 1) < 2.1 * expected + 11
    assert 4 * expected < runtime({}, 2) < runtime({}, 3)


def test_no_job_asks_for_more_time_than_the_cluster_allows(jobs):
    assert Place(hours=1).resources(jobs)["runtime"]({}, 4) == 60


def test_memory_is_that_of_the_largest_job_and_more_when_it_failed(jobs):
    mem_mb = Place().resources(jobs)["mem_mb"]
    assert max(map(plan.job_mib, jobs)) < mem_mb({}, 1) < mem_mb({}, 2)
    assert Place().resources(jobs[:1])["mem_mb"]({}, 1) <= mem_mb({}, 1)


def test_a_rule_of_many_jobs_asks_for_the_one_of_its_wildcard(jobs):
    by_run = Place().resources({"small": find(load_all(), "R1").jobs("smoke")[0], "large": jobs[0]})
    for name in ("runtime", "mem_mb"):
        small, large = (by_run[name](SimpleNamespace(run=run), 1) for run in ("small", "large"))
        assert small < large


def test_only_jobs_on_a_gpu_ask_for_one(jobs):
    there, here = Place("cuda"), Place()
    assert (there.resources(jobs)["gres"], there.option) == ("gpu:1", "--device cuda")
    assert "gres" not in here.resources(jobs)
    assert here.option == ""
    assert there.resources(jobs)["mem_mb"]({}, 1) > here.resources(jobs)["mem_mb"]({}, 1)


def test_processes_that_simulate_get_a_core_each(jobs):
    there = Place("cuda", workers=4)
    assert there.option == "--device cuda --env-workers 4"
    assert there.resources(jobs)["cpus_per_task"] == 5
    assert there.resources(jobs)["mem_mb"]({}, 1) > Place("cuda").resources(jobs)["mem_mb"]({}, 1)
    assert "cpus_per_task" not in Place("cuda").resources(jobs), "a core is what every job has"


BAD = [{"device": "gpu"}, {"device": 1}, {"hours": "x"}, {"hours": 0}, {"hours": float("inf")}, {"workers": -1}]


@pytest.mark.parametrize("bad", [*BAD, {"workers": 1.5}])
def test_a_place_that_cannot_be_is_refused_with_what_to_type(bad):
    with pytest.raises(UserError, match=r"Write e\.g\. "):
        Place(**bad)
