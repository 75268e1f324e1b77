"""Experiment file + tier -> runs: what makes two runs the same, and that every file and every claim can be used."""

import functools
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import paired
import synthetic
from dynarep import cli
from dynarep.configs import AgentConfig, Config, Dials, EnvironmentConfig, PartConfig, ProtocolConfig, registry
from dynarep.envs import split_task
from dynarep.errors import UserError
from dynarep.experiment import Experiment, RunConfig, _blocks, distinct, identity, load, load_all, span
from dynarep.schema import budget_model
from dynarep.statements import RankClaim
from synthetic import TRIAL

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
FILES = sorted(p for p in EXPERIMENTS.glob("*/*.yaml") if p.parent.name not in ("tiers", "profiles"))
R1 = "madtd/R1_generalisation.yaml"
PARTS: list[type[PartConfig]] = [*registry(AgentConfig).values(), *registry(ProtocolConfig).values()]
FIELDS = [(part, field) for part in (EnvironmentConfig, *PARTS) for field in part.model_fields]


@functools.cache
def read(file: Path) -> Experiment:
    return load(file)


@functools.cache
def source(file: Path) -> str:
    return json.dumps(yaml.safe_load(file.read_text(encoding="utf-8")))


def write(home: Path, name: str, data: dict[str, Any]) -> Experiment:
    path = home / "experiments" / name
    path.write_text(json.dumps(data), encoding="utf-8")
    return load(path)


def identities(experiment: Experiment) -> dict[tuple[Any, ...], str]:
    """(tier, group, variant, task, seeds) -> identity of every job."""
    return {
        (job.tier, job.group, job.variant, job.task, job.seeds): job.config.identity()
        for tier in experiment.tiers()
        for job in experiment.jobs(tier)
    }


# -- identity -----------------------------------------------------------------------------------------------------


def backwards(data: Any) -> Any:
    """The same data with every mapping's keys the other way round."""
    if isinstance(data, dict):
        return {key: backwards(value) for key, value in reversed(data.items())}
    return [backwards(item) for item in data] if isinstance(data, list) else data


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_order_of_keys_in_a_file_makes_no_new_run(file, new_home):
    other = write(new_home, f"{file.parent.name}/{file.name}", backwards(json.loads(source(file))))
    assert identities(other) == identities(read(file))


def test_the_order_of_keys_in_a_configuration_makes_no_new_run():
    content = read(EXPERIMENTS / R1).jobs("smoke")[0].config.content()
    assert identity(backwards(content)) == identity(content)
    with pytest.raises(ValueError, match="JSON"):
        identity({"lr": float("nan")})


def test_the_derivation_of_identities_has_not_changed():
    """If it has, no run that was ever made is found again: raise `experiment.FORMAT`."""
    content = {"b": [1.5, "ä"], "a": None}
    assert identity(content) == hashlib.sha256(b'{"a":null,"b":[1.5,"\\u00e4"]}').hexdigest()
    assert identity(content).startswith("cbfa2e70")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_words_and_claims_make_no_new_run(file, new_home):
    """Otherwise correcting a caption would throw away the runs."""
    data = json.loads(source(file))
    data |= {"id": "Z9", "title": "other", "caption": "other", "reproduces": "other", "deviations": [], "claims": []}
    data.pop("explains", None)
    data.pop("pairs", None)
    for variant in data["variants"].values():
        variant["label"] += " (other)"
    for group in data["runs"].values():
        group["why"] = "other"
    if not data["runs"]:
        return  # nothing is run
    metric = min(registry(ProtocolConfig)[next(iter(data["runs"].values()))["protocol"]].metrics)
    data["figure"] = {"panels": [{"kind": "dots", "metrics": {metric: "other"}, "label": "other"}]}
    data.pop("table", None)
    assert identities(write(new_home, f"{file.parent.name}/other.yaml", data)) == identities(read(file))


def test_the_tiers_name_makes_no_new_run(new_home):
    data = json.loads(source(EXPERIMENTS / R1)) | {"claims": []}
    block = data["runs"]["accelerated"]["budget"]["smoke"]
    data["runs"]["accelerated"]["budget"] = {"smoke": block, "ci": block}
    budget = read_tier("smoke")["budget"]
    (new_home / "experiments/tiers/ci.yaml").write_text(json.dumps({"tier": "ci", "purpose": "x", "budget": budget}))
    experiment = write(new_home, "madtd/other.yaml", data)
    assert [j.key() for j in experiment.jobs("smoke")] == [j.key() for j in experiment.jobs("ci")] != []


def read_tier(tier: str) -> dict[str, Any]:
    return yaml.safe_load((EXPERIMENTS / "tiers" / f"{tier}.yaml").read_text(encoding="utf-8"))


def candidates(annotation: Any, value: Any) -> list[Any]:
    """Other values of the same kind; the first that the field accepts is taken."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if isinstance(value, bool):
        return [not value]
    if value is None:
        return [64, 0.5]
    if isinstance(value, int):
        return [value + 1, value + 8, value + 16, value + 32, 2 * value, value - 1]
    if isinstance(value, float):
        return [value / 2, value * 2, value + 0.5]
    if isinstance(value, tuple):
        return [(*value[:-1], 2 * value[-1]) if value else (16,), (16,), (200,), ("touch",)]
    if isinstance(value, Config):
        return [value.model_copy(update={"nuisance": value.nuisance + 1})]
    return ["gymnasium", "walker-run"]


COMPANIONS: dict[str, dict[str, Any]] = {"model_free": {"model_fraction": 0.0}}  # what a value cannot do without


@pytest.mark.parametrize(("part", "field"), FIELDS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_every_hyperparameter_is_part_of_a_runs_identity(part, field):
    """A field that is left out would let two different runs share a folder."""
    base = {key: value for key, value in COMPANIONS.get(field, {}).items() if key in part.model_fields}
    first = part.model_validate(base)
    before = getattr(first, field)
    for value in candidates(part.model_fields[field].annotation, before):
        try:
            changed = part.model_validate({**base, field: value})
        except ValidationError:
            continue
        if getattr(changed, field) != before:
            break
    else:
        pytest.fail(f"no other valid value of {part.__name__}.{field} found: add one to `candidates`")
    places = {"agent": AgentConfig, "protocol": ProtocolConfig, "environment": EnvironmentConfig}
    place = next(name for name, kind in places.items() if issubclass(part, kind))
    defaults = {
        "environment": EnvironmentConfig(),
        "agent": next(iter(registry(AgentConfig).values()))(),
        "protocol": next(iter(registry(ProtocolConfig).values()))(),
    }
    old, new = RunConfig(**{**defaults, place: first}), RunConfig(**{**defaults, place: changed})
    assert new.identity() != old.identity()
    assert new.folder() != old.folder()


@pytest.mark.parametrize("dial", Dials.model_fields)
def test_every_dial_is_part_of_a_runs_identity(dial):
    """Arms of one task differ in nothing else."""
    config = read(EXPERIMENTS / R1).jobs("smoke")[0].config
    before = getattr(Dials(), dial)
    other = before / 2 if isinstance(before, float) and before else before + 1
    turned = EnvironmentConfig.model_validate({"dials": {dial: other}})
    identities = [replace(config, environment=one).identity() for one in (EnvironmentConfig(), turned)]
    assert identities[0] != identities[1]


@pytest.mark.parametrize(("place", "kind"), [("agent", AgentConfig), ("protocol", ProtocolConfig)])
def test_agents_and_protocols_are_part_of_a_runs_identity(place, kind):
    """Two of them with the same fields would otherwise share runs."""
    config = read(EXPERIMENTS / R1).jobs("smoke")[0].config
    for part in registry(kind).values():
        assert replace(config, **{place: part()}).content()[place]["name"] == part.name


def test_different_runs_never_share_a_folder():
    """The folder shows eight digits of the identity: enough for the runs that there are."""
    configs = [j.config for file in FILES for tier in read(file).tiers() for j in read(file).jobs(tier)]
    assert len({config.folder() for config in configs}) == len({config.identity() for config in configs}) > 50


# -- sharing and seeds --------------------------------------------------------------------------------------------


def test_two_experiments_that_need_the_same_run_share_it(new_home):
    data = json.loads(source(EXPERIMENTS / R1)) | {"id": "R99", "claims": []}
    write(new_home, "madtd/R99.yaml", data)
    first, second = (e for e in load_all() if e.spec.id in ("R1", "R99"))
    jobs = first.jobs("smoke")
    assert [job.folders() for job in jobs] == [job.folders() for job in second.jobs("smoke")]
    assert distinct([*jobs, *second.jobs("smoke")]) == jobs


def test_jobs_that_overlap_train_a_seed_once(new_home):
    """Two rules with the same output would stop the DAG."""
    (job, *_) = read(EXPERIMENTS / R1).jobs("smoke")
    blocks = [(0, 1), (1, 2, 3), (2,), (3, 4)]
    left = distinct([replace(job, seeds=seeds) for seeds in blocks])
    assert [job.seeds for job in left] == [(0, 1), (2, 3), (4,)]


@settings(deadline=None)
@given(
    first=st.integers(0, 1000),
    count=st.integers(1, 100),
    size=st.one_of(st.none(), st.integers(1, 120)),
)
def test_every_seed_is_in_one_block(first, count, size):
    blocks = _blocks({"first_seed": first, "seeds": count, "seeds_per_job": size})
    assert [seed for block in blocks for seed in block] == list(range(first, first + count))
    assert all(1 <= len(block) <= (size or count) for block in blocks)
    assert len(blocks) == -(-count // (size or count))


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20, unique=True))
def test_seeds_written_for_people_are_read_back(seeds):
    """The DAG passes them to the command line this way."""
    assert cli.train.parse_seeds(span(seeds)) == tuple(seeds)


@pytest.mark.parametrize(
    ("seeds", "written"), [((3,), "3"), ((0, 1, 2, 5), "0-2,5"), ((4, 5), "4-5"), ((5, 4), "5,4"), ((), "")]
)
def test_seeds_are_written_as_people_write_them(seeds, written):
    assert span(seeds) == written


def test_what_overlaps_between_experiments_is_trained_once_in_whatever_blocks(new_home):
    """One asks for six seeds in a block, the other for the first ones alone and for one more."""
    block = TRIAL["runs"]["small"]["budget"]["smoke"][0]

    def runs(**changes: Any) -> dict[str, Any]:
        return {"small": {**TRIAL["runs"]["small"], "budget": {"smoke": [{**block, **changes}]}}}

    whole = synthetic.trial(new_home, runs=runs(seeds=6), claims=[])
    other = synthetic.trial(new_home, id="Y2", runs=runs(seeds=7, seeds_per_job=2), claims=[])
    jobs = distinct([*whole.jobs("smoke"), *other.jobs("smoke")])
    wanted = {folder for job in [*whole.jobs("smoke"), *other.jobs("smoke")] for folder in job.folders()}
    trained = [folder for job in jobs for folder in job.folders()]
    assert sorted(trained) == sorted(wanted), "a run is trained twice or never"
    assert {(job.experiment, job.seeds) for job in jobs} == {("Y1", (0, 1, 2, 3, 4, 5)), ("Y2", (6,))}


# -- arms ---------------------------------------------------------------------------------------------------------


def test_arms_of_different_agents_share_a_group_and_take_the_settings_they_know(new_home):
    jobs = synthetic.trial(new_home).jobs("smoke")
    by_arm = {job.variant: job.config.agent for job in jobs if job.task == "hopper-hop"}
    assert {variant: agent.name for variant, agent in by_arm.items()} == {
        **{"sac": "sac", "little": "mbpo", "mbpo": "mbpo", "ftfl": "mbpo"}
    }
    assert {agent.lr for agent in by_arm.values()} == {1e-3}, "the group's setting"
    assert {agent.width for agent in by_arm.values()} == {16}, "the budget"
    assert {agent.model_lr for name, agent in by_arm.items() if name != "sac"} == {1e-3}


def test_an_arm_runs_on_its_own_tasks_alone(new_home):
    jobs = synthetic.trial(new_home).jobs("paper")
    assert {job.task for job in jobs if job.variant == "ftfl"} == {"hopper-hop"}
    assert {job.task for job in jobs if job.variant == "mbpo"} == {"hopper-hop", "quadruped-walk", "Hopper-v5"}


def test_a_claim_is_judged_on_the_tasks_that_both_sides_run(new_home):
    experiment = synthetic.trial(new_home)
    (claim,) = experiment.spec.judged()
    jobs = experiment.judging_jobs(claim, "paper")
    assert {(job.variant, job.task) for job in jobs} == {("ftfl", "hopper-hop"), ("sac", "hopper-hop")}


def test_a_tier_judges_a_claim_on_those_of_its_tasks_that_it_runs(new_home):
    claim = TRIAL["claims"][0]
    contrast = claim["contrast"] | {"of": {"variant": "mbpo", "metric": "return/final"}}
    contrast["tasks"] = ["quadruped-walk", "Hopper-v5"]
    claims = [claim | {"contrast": contrast, "tiers": {"smoke": "reported", "paper": "gated"}}]
    experiment = synthetic.trial(new_home, claims=claims)
    found = {t: {j.task for j in experiment.judging_jobs(experiment.spec.judged()[0], t)} for t in ("smoke", "paper")}
    assert found == {"smoke": {"Hopper-v5"}, "paper": {"quadruped-walk", "Hopper-v5"}}


def test_the_first_named_group_that_a_tier_has_judges_a_claim(new_home):
    small = TRIAL["runs"]["small"]
    runs = {
        "small": {**small, "budget": {"smoke": small["budget"]["smoke"]}},
        "large": {**small, "budget": {"paper": small["budget"]["paper"]}},
        "other": {**small, "settings": {}},
    }
    tiers = {"smoke": "reported", "paper": "gated"}
    claims = [TRIAL["claims"][0] | {"runs": ["small", "large"], "tiers": tiers}]
    experiment = synthetic.trial(new_home, runs=runs, claims=claims)
    (claim,) = experiment.spec.judged()
    assert [experiment.judging_groups(claim, tier) for tier in tiers] == [("small",), ("large",)]
    assert {job.group for job in experiment.judging_jobs(claim, "paper")} == {"large"}


def test_the_arms_of_a_claim_may_run_in_groups_of_their_own(new_home):
    """Agents of different papers have budgets of their own; a third group says nothing about the claim."""
    small = TRIAL["runs"]["small"]
    arms = {"theirs": ["sac"], "ours": ["ftfl"], "more": ["mbpo", "little"]}
    runs = {name: {**small, "variants": variants} for name, variants in arms.items()}
    experiment = synthetic.trial(new_home, runs=runs)
    (claim,) = experiment.spec.judged()
    assert experiment.judging_groups(claim, "paper") == ("theirs", "ours")
    assert {(job.group, job.variant) for job in experiment.judging_jobs(claim, "paper")} == {
        ("theirs", "sac"),
        ("ours", "ftfl"),
    }


def test_a_claim_whose_arm_runs_in_two_groups_must_say_which(new_home):
    small = TRIAL["runs"]["small"]
    runs = {name: {**small, "variants": ["sac", "ftfl"]} for name in ("one", "two")}
    with pytest.raises(UserError, match="several groups have such runs at this tier"):
        synthetic.trial(new_home, runs=runs)


def test_a_claim_of_ranks_is_judged_on_all_groups_of_its_pairs_and_their_common_tasks(new_home):
    data = paired.form()
    data["runs"]["fits"]["budget"]["ci"][0]["tasks"] = ["hopper-hop", "walker-walk"]
    data["runs"]["other"] = data["runs"]["agents"] | {"variants": ["unpaired"]}
    data["variants"]["unpaired"] = {"label": "unpaired"}
    experiment = paired.load(new_home, **data)
    (claim,) = experiment.spec.judged()
    jobs = experiment.judging_jobs(claim, "ci")
    assert experiment.judging_groups(claim, "ci") == ("fits", "agents")
    assert {job.variant for job in jobs} == set(experiment.spec.variants) - {"unpaired"}
    assert {job.task for job in jobs} == {"hopper-hop"}, "the agents run nowhere else"
    assert len(jobs) == 3 * paired.SETTINGS
    by_pair = experiment.pair_jobs("ci")
    assert list(by_pair) == [pair.label for pair in experiment.spec.pairs]
    assert {job.variant for job in by_pair["reward x 1/4"]} == {"fit_2", "direct_2", "residual_2"}


def test_pairs_that_share_an_arm_do_not_ask_for_it_twice(new_home):
    """A run would be counted, and a divergence, as often as it is compared with."""
    pairs = paired.form()["pairs"]
    for pair in pairs:
        pair["to"] = "residual_0"
    experiment = paired.load(new_home, pairs=pairs)
    jobs = experiment.judging_jobs(experiment.spec.judged()[0], "ci")
    assert [job.variant for job in jobs].count("residual_0") == 1


def test_what_an_experiment_stands_beside_must_be_there(new_home):
    explains = {"turned": "a", "happened": "b", "says": "c", "beside": ["R1", "C22"]}
    synthetic.trial(new_home, explains=explains)
    with pytest.raises(
        UserError, match=r"Y1\.yaml is not valid:\n  explains\.beside: unknown experiment 'C22'\. Did you"
    ):
        load_all()
    synthetic.trial(new_home, explains=explains | {"beside": ["R1", "Y1"]})
    with pytest.raises(UserError, match="unknown experiment 'Y1'"):
        load_all()
    synthetic.trial(new_home, explains=explains | {"beside": ["R1", "C"]})
    assert load_all()


# -- tiers --------------------------------------------------------------------------------------------------------


def test_a_tier_can_change_budgets_and_nothing_else(new_home):
    """A tier that could change a learning rate would test another algorithm."""
    budget = {key for part in PARTS for key in part.budget} | {"tasks", "seeds", "first_seed", "seeds_per_job"}
    assert set(budget_model().model_fields) == budget
    for part in (EnvironmentConfig, *PARTS):
        for field in set(part.model_fields) - budget:
            with pytest.raises(ValidationError, match="extra_forbidden"):
                budget_model().model_validate({field: part.model_fields[field].default})
    (new_home / "experiments/tiers/smoke.yaml").write_text(
        json.dumps({"tier": "smoke", "purpose": "x", "budget": {"seeds": 1, "discount": 0.5}})
    )
    with pytest.raises(UserError, match=r"budget\.discount"):
        load(new_home / "experiments" / R1)


def test_no_hyperparameter_of_the_algorithm_is_a_budget():
    """What a tier may change is size and length, never how an algorithm learns."""
    for part in PARTS:
        assert part.budget <= set(part.model_fields), part
        learning = ("lr", "rate", "discount", "clip", "loss", "target", "decay", "fraction", "ratio")
        assert not [key for key in part.budget if any(word in key for word in learning)], part


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_between_tiers_only_budgets_differ(file):
    spec = read(file).spec
    for group, variant in ((group, variant) for group in spec.runs for variant in spec.variants):
        found = set()
        for tier in read(file).tiers():
            for job in read(file).jobs(tier):
                if (job.group, job.variant) == (group, variant):
                    rest = job.config.content()
                    for place, part in (("agent", job.config.agent), ("protocol", job.config.protocol)):
                        rest[place] = {k: v for k, v in rest[place].items() if k not in part.budget}
                    rest["environment"] = {k: v for k, v in rest["environment"].items() if k not in ("suite", "task")}
                    found.add(identity(rest))
        assert len(found) <= 1, f"{group}, {variant}"


def test_an_experiments_budget_goes_before_the_tiers(new_home):
    data = json.loads(source(EXPERIMENTS / R1)) | {"claims": []}
    data["runs"]["accelerated"]["budget"] = {"smoke": [{"tasks": ["dog-run"], "seeds": "3", "first_seed": None}]}
    tier = {"tier": "smoke", "purpose": "x", "budget": {"seeds": 7, "seeds_per_job": 2.0, "updates": 64, "width": 8}}
    (new_home / "experiments/tiers/smoke.yaml").write_text(json.dumps(tier))
    jobs = [j for j in write(new_home, "madtd/other.yaml", data).jobs("smoke") if j.variant == "utd16_five"]
    assert [job.seeds for job in jobs] == [(0, 1), (2,)]
    assert (jobs[0].config.protocol.updates, jobs[0].config.agent.width) == (64, 8)


def test_a_variants_settings_go_before_the_budget_and_this_before_the_groups(new_home):
    data = json.loads(source(EXPERIMENTS / R1)) | {"claims": []}
    data["variants"]["utd16_five"]["agent"]["batch_size"] = 64
    data["runs"]["accelerated"]["settings"]["agent"] |= {"batch_size": 128, "width": 128, "clip": 1.0}
    jobs = write(new_home, "madtd/other.yaml", data).jobs("smoke")
    sizes = {job.variant: (job.config.agent.batch_size, job.config.agent.width, job.config.agent.clip) for job in jobs}
    assert sizes == {"utd16_zero": (32, 16, 1.0), "utd16_five": (64, 16, 1.0)}


# -- the files that there are -------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_experiment_resolves_at_every_tier_it_has(file):
    experiment = read(file)
    assert experiment.tiers()
    for tier in experiment.tiers():
        jobs = experiment.jobs(tier)
        assert jobs or experiment.spec.from_defaults
        assert len({(job.key(), job.group) for job in jobs}) == len(jobs), "a run is listed twice"
        for job in jobs:
            for part in (job.config.environment, job.config.agent, job.config.protocol):
                assert type(part).model_validate(part.model_dump()) == part
                assert type(part).model_validate_json(part.model_dump_json()) == part
            assert split_task(job.task)[0] == job.config.environment.suite
            assert job.seeds
            work = job.config.protocol.work(job.config.agent, 10, 3)
            assert sum(piece.updates for piece in work) > 0
            assert all(piece.gflop >= 0 and piece.units > 0 for piece in work)


def test_every_tier_file_is_used():
    used = {tier for file in FILES for tier in read(file).tiers()}
    assert used == {path.stem for path in (EXPERIMENTS / "tiers").glob("*.yaml")}


CLAIMS = [(file, claim.id, tier) for file in FILES for claim in read(file).spec.judged() for tier in claim.tiers]


@pytest.mark.parametrize(("file", "name", "tier"), CLAIMS, ids=lambda x: x if isinstance(x, str) else x.stem)
def test_the_two_sides_of_a_claim_have_the_same_tasks_and_seeds(file, name, tier):
    """A paired comparison of different seeds would not be one."""
    experiment = read(file)
    (claim,) = (claim for claim in experiment.spec.judged() if claim.id == name)
    if claim.tiers[tier] == "untested":
        return
    if isinstance(claim, RankClaim):
        for pair in experiment.spec.pairs:
            jobs = experiment.pair_jobs(tier)[pair.label]
            arms = [
                {(j.task, seed) for j in jobs if j.variant == arm for seed in j.seeds} for arm in (pair.of, pair.to)
            ]
            assert arms[0] == arms[1], pair.label
            assert len(arms[0]) >= 2, "no interval"
            assert any(job.variant == pair.predictor for job in jobs)
        return
    sides = []
    for side in claim.sides:  # a published number has none
        jobs = [job for job in experiment.judging_jobs(claim, tier) if job.variant == side.variant]
        assert len({job.group for job in jobs}) == 1
        sides.append([(job.task, seed) for job in jobs for seed in job.seeds])
        assert len(set(sides[-1])) == len(sides[-1]) >= 2, "one seed gives no interval, a seed twice a false one"
    assert all(side == sides[0] for side in sides)
