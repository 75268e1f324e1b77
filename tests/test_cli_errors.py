"""Bad input: one message that says what is wrong where and what to type, exit code 2, nothing created or changed."""

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import paired
import synthetic
from dynarep import cli, experiment, run

Change = Callable[[Path], object]
R1, C, SMOKE = "madtd/R1_generalisation.yaml", "ftfl/C_reward_model.yaml", "tiers/smoke.yaml"
LIST, PLAN, CLAIMS = ["list"], ["plan", "--tier", "smoke"], ["claims", "--tier", "smoke"]
TRAIN = ["train", "--tier", "smoke", "--experiment", "R1", "--variant", "utd16_zero", "--task", "walker-walk"]
FIGURE = ["figure", "--tier", "smoke", "--experiment", "R1"]
BUDGET = "runs.accelerated.budget.smoke.0"
TYRO = "For full helptext"  # tyro's own messages end with it

# -- what a case breaks -------------------------------------------------------------------------------------------


def nothing(home: Path) -> None:
    """The arguments are wrong, the files are right."""


@functools.cache
def as_json(content: bytes) -> str:
    """JSON is YAML, and read faster."""
    return json.dumps(yaml.safe_load(content))


def edited(file: str, edit: Callable[[Any], object]) -> Change:
    def change(home: Path) -> None:
        path = home / "experiments" / file
        data = json.loads(as_json(path.read_bytes()))
        edit(data)
        path.write_text(json.dumps(data, indent=1), encoding="utf-8")

    return change


def inner(data: Any, dotted: str) -> tuple[Any, Any]:
    """Return the mapping or list that holds a dotted key, and the key."""
    *parents, last = (int(part) if part.isdigit() else part for part in dotted.split("."))
    for part in parents:
        data = data[part]
    return data, last


def put(file: str, dotted: str, value: Any) -> Change:
    def edit(data: Any) -> None:
        holder, key = inner(data, dotted)
        holder[key] = value

    return edited(file, edit)


def misspell(file: str, dotted: str, wrong: str) -> Change:
    def edit(data: Any) -> None:
        holder, key = inner(data, dotted)
        holder[wrong] = holder.pop(key)

    return edited(file, edit)


def drop(file: str, dotted: str) -> Change:
    def edit(data: Any) -> None:
        holder, key = inner(data, dotted)
        del holder[key]

    return edited(file, edit)


def text(file: str, content: str | bytes) -> Change:
    data = content.encode() if isinstance(content, str) else content
    return lambda home: (home / "experiments" / file).write_bytes(data)


def both(*changes: Change) -> Change:
    return lambda home: [change(home) for change in changes]


def copied(file: str, to: str) -> Change:
    return lambda home: shutil.copy(home / "experiments" / file, home / "experiments" / to)


PAIRED = "beyond/Y3.yaml"  # tests/paired.py


def of_pairs(*dotted: tuple[str, Any]) -> Change:
    """Write the experiment of pairs with other values; None drops a key."""

    def change(home: Path) -> None:
        data = {**synthetic.TRIAL, **paired.form()}
        for place, value in dotted:
            holder, key = inner(data, place)
            if value is None:
                del holder[key]
            else:
                holder[key] = value
        (home / "experiments" / PAIRED).write_text(json.dumps(data, indent=1), encoding="utf-8")

    return change


def removed(place: str) -> Change:
    def change(home: Path) -> None:
        path = home / place
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def in_the_way(place: str) -> Change:
    """A file where a folder should be made."""

    def change(home: Path) -> None:
        (home / place).parent.mkdir(parents=True, exist_ok=True)
        (home / place).write_text("in the way")

    return change


def with_runs(*changes: Callable[[Path], object]) -> Change:
    """Put the finished run below the home's results and spoil it; the run's folder is passed on."""

    def change(home: Path) -> None:
        shutil.copytree(FINISHED[0], home / "results" / "runs")
        (folder,) = (home / "results" / "runs").glob("*/*/*/seed=0")
        for spoil in changes:
            spoil(folder)

    return change


def manifest(edit: Callable[[Any], object]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        data = json.loads((folder / "manifest.json").read_text())
        edit(data)
        (folder / "manifest.json").write_text(json.dumps(data))

    return change


def no_json(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"identity": "torn')


def one_digit(folder: Path) -> None:
    file = folder / "metrics.csv"
    content = file.read_bytes()
    file.write_bytes(content[:-2] + (b"1" if content[-2:-1] != b"1" else b"2") + content[-1:])


def no_metrics(folder: Path) -> None:
    (folder / "metrics.csv").unlink()


def as_seed_1(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("seed=1"))


FINISHED: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def _one_finished_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Train seed 0 of R1's first arm at the smoke tier, once."""
    checkout = Path(__file__).resolve().parents[1]
    r1 = experiment.load(checkout / "experiments" / R1)
    job = cli.train.find_job(r1, "utd16_zero", "walker-walk", "0", "smoke", None)
    FINISHED[:] = [tmp_path_factory.mktemp("finished")]
    run.train(job, FINISHED[0])


# -- the table: what is broken, what is typed, what the message must say ------------------------------------------

CASES: dict[str, tuple[Change, list[str], list[str]]] = {
    # pairs, and what is shown and judged of them
    "pair of an unknown variant": (
        of_pairs(("pairs.1.of", "direkt_1")), LIST,
        [PAIRED, "pairs.1.of: unknown variant 'direkt_1'. Did you mean 'direct_1'?"],
    ),
    "pair of one arm": (
        of_pairs(("pairs.1.of", "residual_1")), LIST,
        ["pairs.1: 'of' and 'to' are both 'residual_1': the outcome would be 0"],
    ),
    "pairs of one label": (
        of_pairs(("pairs.1.label", "reward x 1/4")), LIST,
        ["pairs: 2 of them have the label 'reward x 1/4'. Write labels that tell them apart."],
    ),
    "too few pairs": (
        of_pairs(("pairs", paired.form()["pairs"][:2]), ("claims", [])), LIST,
        ["pairs: 2, but fewer than 3 have no order to speak of."],
    ),
    "too few pairs for a claim": (
        of_pairs(("pairs", paired.form()["pairs"][:4])), LIST,
        ["claims.Z3.contrast: 5 settings can say something at the least; 'pairs:' has 4."],
    ),
    "scatter without pairs": (
        of_pairs(("pairs", None), ("claims", [])), LIST,
        ["figure.panels.0: a scatter shows the experiment's pairs, and there are none. Write 'pairs:'."],
    ),
    "variant of a pair in two groups": (
        of_pairs(("runs.fits.variants", None), ("runs.agents.variants", ["residual_1", "direct_1"])), LIST,
        ["pairs: 'residual_1' runs in several groups at tier ci: fits, agents.", "variants of its own"],
    ),
    "scatter without an outcome": (
        of_pairs(("figure.panels.0.outcome", None)), LIST,
        ["figure.panels.0: a scatter needs one metric, of the predictors, and an 'outcome'"],
    ),
    "outcome of another panel": (
        of_pairs(("figure.panels.0.kind", "dots")), LIST,
        ["figure.panels.0: 'outcome' and 'average' are of a scatter"],
    ),
    "scatter of chosen variants": (
        of_pairs(("figure.panels.0.variants", ["fit_1"])), LIST,
        ["figure.panels.0: a scatter shows the experiment's pairs; leave 'published' and 'variants' out"],
    ),
    "predictor that nobody records": (
        of_pairs(("claims.0.contrast.predictor", "reward/nmes")), LIST,
        ["claims.Z3.metrics: unknown metric 'reward/nmes'. Did you mean 'reward/nmse'?"],
    ),
    "outcome that its protocol does not record": (
        of_pairs(("claims.0.contrast", {"kind": "rank", "predictor": "return/final", "outcome": "return/final"})), LIST,
        ["claims.Z3.contrast: 'fit_0' of pair 'reward x 1/1' runs under model_fit, which has no 'return/final'."],
    ),
    "scatter and claim of different averages": (
        of_pairs(("claims.0.contrast.average", "median")), LIST,
        ["figure.panels.0.average: geometric, but claims.Z3.contrast.average is median, of the same metrics."],
    ),
    "ranks that are equal": (
        of_pairs(("claims.0.direction", "equal")), LIST,
        ["claims.0: a rank correlation is tested against 0 alone; direction must be 'greater' or 'less'"],
    ),
    "ranks beyond one": (
        of_pairs(("claims.0.smallest", 1.5)), LIST,
        ["claims.0: no_effect of a rank correlation must be 0, and smallest lie between -1 and 1"],
    ),
    "ranks with a group": (
        of_pairs(("claims.0.runs", "fits")), LIST,
        ["claims.0: leave 'runs' out: a rank correlation is judged wherever the pairs' variants run"],
    ),
    "ranks with two sides": (
        of_pairs(("claims.0.contrast.of", {"variant": "fit_0", "metric": "reward/nmse"})), LIST,
        ["claims.0.contrast.of: unknown key.", "Allowed: average, kind, outcome"],
    ),
    "ranks of runs that a tier does not have": (
        of_pairs(("claims.0.tiers", {"smoke": "reported"})), LIST,
        ["claims.Z3.tiers.smoke: reported, but of pair 'reward x 1/1' fit_0, direct_0, residual_0 share no task"],
    ),
    "ranks of a task that an arm does not run": (
        of_pairs(("pairs.2.tasks", ["hopper-hop", "walker-walk"])), LIST,
        ["claims.Z3.tiers.ci: reported, but of pair 'reward x 1/4' not all of fit_2, direct_2, residual_2 run walker"],
    ),
    "ranks of arms without a common seed": (
        of_pairs(
            ("runs.more", {**paired.form()["runs"]["agents"], "variants": ["direct_3"], "budget": {"ci": [
                {**paired.form()["runs"]["agents"]["budget"]["ci"][0], "first_seed": 50}]}}),
            ("runs.agents.variants", [f"{arm}_{k}" for k in range(6) for arm in ("direct", "residual")
                                      if (arm, k) != ("direct", 3)]),
        ), LIST,
        ["claims.Z3.tiers.ci: reported, but of pair 'reward x 1/8' 'direct_3' and 'residual_3' share no seed there."],
    ),
    "experiment beside that does not exist": (
        of_pairs(("explains", {"turned": "a", "happened": "b", "says": "c", "beside": ["R11"]})), LIST,
        [PAIRED, "explains.beside: unknown experiment 'R11'. Did you mean 'R1'?"],
    ),
    "explanation without a word": (
        of_pairs(("explains", {"turned": "", "happened": "b", "sayss": "c"})), LIST,
        ["explains.turned: string should have at least 1 character", "explains.sayss: unknown key", "'says'?",
         "explains.says: is missing"],
    ),
    # a misspelt key, at each level
    "key at the top": (
        misspell(R1, "caption", "captoin"), PLAN,
        [R1, "captoin: unknown key", "'caption'?", "deviations", "caption: is missing"],
    ),
    "key of a variant": (
        misspell(R1, "variants.utd16_zero.label", "lable"), PLAN,
        [R1, "variants.utd16_zero.lable: unknown key", "'label'?", "Allowed: agent, algorithm, dose"],
    ),
    "key of a group": (
        misspell(R1, "runs.accelerated.protocol", "protcol"), PLAN,
        [R1, "runs.accelerated.protcol: unknown key", "'protocol'?", "Allowed: agent, budget"],
    ),
    "key of a budget": (
        misspell(R1, f"{BUDGET}.updates", "update"), PLAN,
        [R1, f"{BUDGET}.update: not a budget key", "'updates'?", "Allowed: batch_size", "width"],
    ),
    "key of settings": (
        misspell(R1, "runs.accelerated.settings.environment", "enviroment"), PLAN,
        [R1, "runs.accelerated.settings.enviroment: unknown key", "'environment'?", "Allowed: agent, environment"],
    ),
    "key of settings.agent": (
        misspell(R1, "runs.accelerated.settings.agent.discount", "discuont"), PLAN,
        [R1, "runs.accelerated.settings.agent.discuont: unknown key", "'discount'?", "Allowed: batch_size, bins"],
    ),
    "key of settings.protocol": (
        put(R1, "runs.accelerated.settings.protocol", {"horizon_margn": 100}), PLAN,
        [R1, "runs.accelerated.settings.protocol.horizon_margn: unknown key", "'horizon_margin'?", "eval_episodes"],
    ),
    "key of settings.environment": (
        misspell(R1, "runs.accelerated.settings.environment.action_repeat", "action_repaet"), PLAN,
        [R1, "runs.accelerated.settings.environment.action_repaet: unknown key", "'action_repeat'?", "reward_scale"],
    ),
    "key of a variant's agent": (
        misspell(R1, "variants.utd16_five.agent.model_fraction", "model_fractoin"), PLAN,
        [R1, "variants.utd16_five.agent.model_fractoin: unknown key", "'model_fraction'?", "Allowed: batch_size"],
    ),
    "key of the protocol among the agent's": (
        put(R1, "runs.accelerated.settings.agent.updates", 32), PLAN,
        [R1, "runs.accelerated.settings.agent.updates: unknown key", "Allowed: batch_size"],
    ),
    "key of a claim": (
        misspell(R1, "claims.0.no_effect", "no_efect"), PLAN,
        [R1, "claims.0.no_efect: unknown key", "'no_effect'?", "Allowed: contrast, direction"],
    ),
    "key of a contrast": (
        misspell(R1, "claims.0.contrast.kind", "knid"), PLAN,
        [R1, "claims.0.contrast.knid: unknown key", "'kind'?", "Allowed: kind, of, tasks, to"],
    ),
    "key of a contrast's side": (
        misspell(R1, "claims.0.contrast.of.variant", "varaint"), PLAN,
        [R1, "claims.0.contrast.of.varaint: unknown key", "'variant'?", "Allowed: at_frame, metric, task, variant"],
    ),
    "key of a panel": (
        misspell(R1, "figure.panels.0.scale", "scael"), PLAN,
        [R1, "figure.panels.0.scael: unknown key", "'scale'?", "Allowed: average, colour_by, full_score, kind"],
    ),
    "key of a tier file": (
        misspell(SMOKE, "purpose", "purpos"), PLAN,
        [SMOKE, "purpos: unknown key", "'purpose'?", "Allowed: budget, compiled, figures_per_process", "purpose: is"],
    ),
    "key of a tier's budget": (
        misspell(SMOKE, "budget.seeds", "seed"), PLAN,
        [SMOKE, "budget.seed: unknown key", "'seeds'?", "batch_size, chunk"],
    ),
    # a wrong value
    "seeds as a word": (
        put(R1, f"{BUDGET}.seeds", "ten"), PLAN, [R1, f"{BUDGET}.seeds: input should be a valid integer", "got 'ten'"],
    ),
    "no seeds": (
        put(SMOKE, "budget.seeds", 0), PLAN,
        [SMOKE, "budget.seeds: input should be greater than or equal to 1", "got 0"],
    ),
    "seeds of nothing": (put(SMOKE, "budget.seeds", None), PLAN, [f"{BUDGET}.seeds: is missing"]),
    "tasks of nothing": (put(R1, f"{BUDGET}.tasks", None), PLAN, [R1, f"{BUDGET}.tasks: is missing"]),
    "tasks as a word": (
        put(R1, f"{BUDGET}.tasks", "walker-walk"), PLAN, [R1, f"{BUDGET}.tasks: input should be", "got 'walker-walk'"],
    ),
    "negative updates": (
        put(R1, f"{BUDGET}.updates", -3), PLAN,
        [R1, f"{BUDGET}.updates: input should be greater than or equal to 1", "got -3"],
    ),
    "negative updates in a tier file": (
        both(put(SMOKE, "budget.updates", -3), drop(R1, f"{BUDGET}.updates")), PLAN,
        [R1, "tiers/smoke.yaml: budget.updates: input should be greater than or equal to 1", "got -3"],
    ),
    "width not a multiple of 8": (
        put(R1, f"{BUDGET}.width", 12), PLAN, [R1, f"{BUDGET}.width: input should be a multiple of 8", "got 12"],
    ),
    "measured after the end": (
        put(R1, f"{BUDGET}.measure_at", [33]), PLAN,
        [R1, f"{BUDGET}: measure_at, 33: must be in 1..updates, 32"],
    ),
    "probability of two": (
        put(R1, "variants.utd16_five.agent.model_fraction", 2), PLAN,
        [R1, "variants.utd16_five.agent.model_fraction: input should be less than or equal to 1", "got 2"],
    ),
    "task among the settings": (
        put(R1, "runs.accelerated.settings.environment.task", "dog-run"), PLAN,
        [R1, "runs.accelerated.settings.environment.task", "Write it under 'tasks'"],
    ),
    # a name that does not exist
    "task": (
        put(R1, f"{BUDGET}.tasks", ["walker-wlak"]), PLAN,
        [R1, f"{BUDGET}.tasks: unknown task 'walker-wlak'", "did you mean walker-walk"],
    ),
    "agent": (
        put(R1, "runs.accelerated.agent", "madtd"), PLAN,
        [R1, "runs.accelerated.agent: unknown agent 'madtd'", "'mad_td'?", "ensemble, linear_td, mad_td"],
    ),
    "protocol": (
        put(R1, "runs.accelerated.protocol", "forzen"), PLAN,
        [R1, "runs.accelerated.protocol: unknown protocol 'forzen'", "'frozen'?", "Allowed: frozen"],
    ),
    "variant of a group": (
        put(R1, "runs.accelerated.variants", ["utd16_zreo"]), PLAN,
        [R1, "runs.accelerated.variants: unknown variant 'utd16_zreo'", "'utd16_zero'?", "Allowed: "],
    ),
    "variant of a claim": (
        put(R1, "claims.0.contrast.of.variant", "utd16_zreo"), PLAN,
        [R1, "claims.C1.", "unknown variant 'utd16_zreo'", "'utd16_zero'?", "Allowed: "],
    ),
    "variant of a panel": (
        put(R1, "figure.panels.0.variants", ["five"]), PLAN,
        [R1, "figure.panels.0.", "unknown variant 'five'", "'utd16_five'?", "utd16_zero"],
    ),
    "metric of a claim": (
        put(R1, "claims.0.contrast.of.metric", "td_rms/on_polcy"), PLAN,
        [R1, "claims.C1.", "unknown metric 'td_rms/on_polcy'", "'td_rms/on_policy'?", "Allowed: actor/"],
    ),
    "metric of a panel": (
        put(R1, "figure.panels.0.metrics", {"td_rms/trian": "training"}), PLAN,
        [R1, "figure.panels.0.metrics", "unknown metric 'td_rms/trian'", "'td_rms/train'?", "Allowed: actor/"],
    ),
    "group of a claim": (
        put(C, "claims.0.runs", "smal"), PLAN, [C, "claims.F3.runs: unknown group 'smal'", "'small'?", "Allowed: "],
    ),
    "task of a claim": (
        put(C, "claims.0.contrast.tasks", ["walker-run"]), PLAN,
        [C, "claims.F3.contrast.tasks: 'walker-run' has no runs at ci", "'walker-walk'?", "Allowed: "],
    ),
    "tier of a claim": (
        put(R1, "claims.0.tiers", {"cii": "gated"}), PLAN,
        [R1, "claims.0.tiers.cii", "input should be 'smoke', 'ci', 'reduced' or 'paper'", "got 'cii'"],
    ),
    # a claim that nothing can judge
    "claim gated at a tier without runs": (
        both(put(R1, "claims.0.tiers.smoke", "gated"), drop(R1, "runs.accelerated.budget.smoke")), PLAN,
        [R1, "claims.C1.tiers.smoke: gated, but no group has runs", "some at: ci, reduced, paper"],
    ),
    "claim that two groups could judge": (
        edited(R1, lambda data: data["runs"]["paper_constants"]["budget"].update(ci=[{"tasks": ["dog-trot"]}])), PLAN,
        [R1, "claims.C1.tiers.ci: gated, but several groups", "'runs:'", "accelerated, paper_constants"],
    ),
    "claim on a variant that its group does not run": (
        put(R1, "runs.accelerated.variants", ["utd16_zero"]), CLAIMS,
        [R1, "claims.C1b.variant: 'utd16_five' is not among those of runs.accelerated", "Allowed: utd16_zero"],
    ),
    "smallest on the wrong side": (
        put(R1, "claims.0.smallest", 0.7), PLAN, [R1, "claims.0: smallest 0.7 lies on the other side of no_effect 1"],
    ),
    "level with two sides": (
        put(R1, "claims.0.contrast.kind", "level"), PLAN, [R1, "claims.0.contrast: a level has no 'to'"],
    ),
    # arms, doses, tables, arguments
    "arm with an unknown agent": (
        put(R1, "variants.utd16_zero.algorithm", "scac"), PLAN,
        [R1, "variants.utd16_zero.algorithm: unknown agent 'scac'", "'sac'?", "ensemble, linear_td, mad_td"],
    ),
    "agent that the protocol cannot run": (
        put(R1, "variants.utd16_zero.algorithm", "sac"), PLAN,
        [R1, "runs.accelerated: protocol frozen cannot run agent 'sac'", "Allowed: mad_td"],
    ),
    "arm on a task that no tier runs": (
        put(R1, "variants.utd16_five.tasks", ["walker-run"]), PLAN,
        [R1, "variants.utd16_five.tasks: in no budget: 'walker-run'", "'walker-walk'?"],
    ),
    "claim on arms without a common task": (
        both(
            put(R1, "variants.utd16_five.tasks", ["dog-stand"]),
            put(R1, "claims.1.contrast.tasks", ["walker-walk"]),
        ), PLAN, [R1, "claims.C1b.tiers.ci: no task of the claim is run by utd16_five and utd16_zero there"],
    ),
    "dose panel without doses": (
        put(R1, "figure.panels.1.kind", "dose"), PLAN, [R1, "figure.panels.1: a dose panel needs variants with a dose"],
    ),
    "arm without a dose in a dose panel": (
        both(put(R1, "figure.panels.1.kind", "dose"), put(R1, "figure.panels.1.variants", ["utd16_five"])), PLAN,
        [R1, "figure.panels.1.variants: 'utd16_five' has no dose", "variants.utd16_five"],
    ),
    "dose of zero on a log axis": (
        both(
            put(R1, "figure.panels.1.kind", "dose"), put(R1, "figure.panels.1.x_scale", "log"),
            put(R1, "variants.utd16_zero.dose", 0),
        ), PLAN, [R1, "figure.panels.1.x_scale: log, but the dose of 'utd16_zero' is 0"],
    ),
    "neither figure nor table": (drop(R1, "figure"), PLAN, [R1, "write either 'figure' or 'table'"]),
    "figure and table": (
        put(R1, "table", {"kind": "hyperparameters", "agents": ["mad_td"]}), PLAN,
        [R1, "write either 'figure' or 'table'"],
    ),
    "figure that nothing is run for": (
        put(R1, "runs", {}), PLAN, [R1, "only a table that is made from the code can do without variants and runs"],
    ),
    "table of hyperparameters with runs": (
        edited(R1, lambda data: data.update(figure=None, table={"kind": "hyperparameters", "agents": ["mad_td"]})),
        PLAN, [R1, "a table of hyperparameters has no runs"],
    ),
    "table of an unknown agent": (
        edited(R1, lambda data: data.update(
            figure=None, claims=[], runs={}, table={"kind": "hyperparameters", "agents": ["mad_dt"]}
        )), PLAN, [R1, "table.agents: unknown agent 'mad_dt'", "'mad_td'?"],
    ),
    "table whose arm changes nothing that it shows": (
        edited(R1, lambda data: data.update(
            figure=None, claims=[], runs={}, table={"kind": "hyperparameters", "agents": ["sac"]}
        )), PLAN, [R1, "variants.utd16_five.agent: unknown key 'model_fraction'", "Allowed: batch_size"],
    ),
    "table of returns without a metric": (
        edited(R1, lambda data: data.update(figure=None, table={"kind": "returns", "agents": ["mad_td"]})), PLAN,
        [R1, "table: a table of returns needs label and metric, and cannot have agents, protocols"],
    ),
    "table of an unknown metric": (
        edited(R1, lambda data: data.update(
            figure=None, table={"kind": "returns", "metric": "q/trian", "label": "value"}
        )), PLAN, [R1, "table.metrics: unknown metric 'q/trian'", "'q/train'?"],
    ),
    "argument with a contrast": (
        put(R1, "claims.0.empirical", False), PLAN,
        [R1, "claims.0.contrast: unknown key", "claims.0.tiers: unknown key", "Allowed: empirical, id, published"],
    ),
    "argument without a reason": (
        put(R1, "claims.0", {"id": "C1", "empirical": False, "says": "so", "source": "x", "published": "x"}), PLAN,
        [R1, "claims.0.why: is missing"],
    ),
    # files
    "key given twice": (
        text(R1, "id: R1\npaper: madtd\nid: R2\n"), PLAN, [R1, "line 3", "key 'id' is given twice"],
    ),
    "key that is a list": (text(R1, "id: R1\n? [a, b]\n: 1\n"), PLAN, [R1, "line 2", "a key must be a word"]),
    "syntax": (
        text(R1, "id: R1\npaper: madtd\ntitle: {no: closing\nvariants: 1\n"), PLAN,
        [R1, "line 4", "not readable as YAML"],
    ),
    "not a mapping": (text(R1, "- id\n- paper\n"), PLAN, [R1, "must be a mapping of keys to values"]),
    "empty file": (text(R1, ""), PLAN, [R1, "must be a mapping of keys to values"]),
    "not text": (text(R1, b"\xff\xfe\x00id"), PLAN, [R1, "not readable as YAML"]),
    "no experiments": (
        both(*(removed(f"experiments/{paper}") for paper in ("madtd", "ftfl", "beyond"))), PLAN,
        ["experiments: no", "DYNAREP_HOME"],
    ),
    "not a checkout": (removed("experiments"), PLAN, ["experiments: no experiment files", "set DYNAREP_HOME"]),
    "no tier file": (removed(f"experiments/{SMOKE}"), LIST, [SMOKE, "cannot be read: No such file"]),
    "tier file of another tier": (put(SMOKE, "tier", "ci"), PLAN, [SMOKE, "tier: is 'ci'", "smoke.yaml"]),
    "hyperparameter in a tier file": (
        put(SMOKE, "budget.lr", 1e-4), LIST,
        [SMOKE, "budget.lr: unknown key", "batch_size, chunk", "updates_per_step, width"],
    ),
    "hyperparameter in a budget": (
        put(R1, f"{BUDGET}.lr", 1e-4), PLAN, [R1, f"{BUDGET}.lr: not a budget key of mad_td and frozen", "Allowed: "],
    ),
    "two experiments with one id": (
        both(copied(R1, "madtd/R9.yaml")), PLAN, ["madtd/R9.yaml: id 'R1' is already in", R1],
    ),
    "two papers with one id": (put(C, "id", "R1"), PLAN, [f"{C}: id 'R1' is already in", R1]),
    "one claim id in two files": (put(C, "claims.0.id", "C1"), PLAN, [f"{C}: claim 'C1' is already in", R1]),
    "one claim id twice in a file": (put(R1, "claims.1.id", "C1"), PLAN, [f"{R1}: claim 'C1' is already in"]),
    # several faults, all at once
    "several faults of form": (
        both(
            misspell(R1, "caption", "captoin"), misspell(R1, "figure.panels.0.scale", "lgo"),
            put(R1, "claims.0.direction", "up"), put(R1, "id", "R 1"),
        ), PLAN,
        [R1, "captoin: unknown", "figure.panels.0.lgo: unknown", "claims.0.direction: input should be", "id: string"],
    ),
    "several faults of content": (
        both(
            put(R1, "variants.utd16_five.agent.model_fraction", 2), put(R1, f"{BUDGET}.seeds", "ten"),
            put(R1, f"{BUDGET}.lr", 1e-4), put(R1, "runs.paper_constants.agent", "madtd"),
            put(R1, "runs.grid.settings.protocol.ratio", 1), put(R1, "runs.accelerated.settings.agent.gamma", 1),
            put(R1, "claims.0.contrast.of.metric", "error"), put(R1, "claims.1.contrast.of.variant", "ten_percent"),
        ), PLAN,
        [
            R1, "agent.model_fraction: input", f"{BUDGET}.seeds: input", f"{BUDGET}.lr: not a", "unknown agent 'madtd'",
            "settings.protocol.ratio: unknown", "settings.agent.gamma: unknown", "unknown metric 'error'",
            "unknown variant 'ten_percent'",
        ],
    ),
    "faults in two files": (
        both(put(R1, "figure.panels.0.lgo", True), put(C, "claims.0.smallest", 0.5)), PLAN,
        [R1, "panels.0.lgo: unknown key", C, "claims.0: smallest 0.5"],
    ),
    # the command line
    "unknown sub-command": (
        nothing, ["paln"], ["'paln'", "'plan'?", "Allowed: audit, bench, claims, figure", "dynarep --help"],
    ),
    "no sub-command": (nothing, [], ["list, plan, train", TYRO]),
    "unknown option": (nothing, ["plan", "--teir", "smoke"], ["--teir", "--tier", TYRO]),
    "option without a value": (nothing, ["plan", "--tier"], ["--tier", TYRO]),
    "required option missing": (nothing, TRAIN, ["--seeds: missing", "--seeds 0-4", "dynarep train --help"]),
    "job and seeds": (
        nothing, ["train", "--job", "R1/accelerated/utd16_zero/walker-walk/0", "--seeds", "0"],
        ["--job goes without --seeds"],
    ),
    "job cut short": (
        nothing, ["train", "--job", "R1/utd16_zero/walker-walk/0"],
        ["--job 'R1/utd16_zero/walker-walk/0'", "experiment/runs/variant/task/seeds", "e.g. R1/accelerated"],
    ),
    "job of an unknown arm, after one that is right": (
        nothing,
        ["train", "--tier", "smoke", "--job", "R1/accelerated/utd16_zero/walker-walk/0",
         "--job", "R1/accelerated/utd16_zreo/walker-walk/0"],
        ["unknown variant 'utd16_zreo'", "'utd16_zero'?"],
    ),
    "unknown tier": (
        nothing, ["plan", "--tier", "cii"], ["unknown tier 'cii'", "'ci'?", "Allowed: ci, paper", "Pass --tier"],
    ),
    "unknown tier of claims": (nothing, ["claims", "--tier", "papr"], ["unknown tier 'papr'", "'paper'?"]),
    "unknown tier of the report": (nothing, ["report", "--tier", "full"], ["unknown tier 'full'", "Allowed: ci"]),
    "unknown experiment": (
        nothing, ["plan", "--experiment", "R11"], ["unknown experiment 'R11'", "'R1'?", "ftfl_C", "`dynarep list`"],
    ),
    "unknown paper": (
        nothing, ["plan", "--paper", "madt"], ["unknown paper 'madt'", "'madtd'?", "ftfl, madtd", "Pass --paper"],
    ),
    "unknown variant": (
        nothing, [*TRAIN, "--seeds", "0", "--variant", "utd16_zreo"],
        ["unknown variant 'utd16_zreo'", "'utd16_zero'?", "Allowed: ", "Pass --variant"],
    ),
    "unknown task": (
        nothing, [*TRAIN, "--seeds", "0", "--task", "walker-wlk"],
        ["unknown task 'walker-wlk'", "'walker-walk'?", "Allowed: walker-walk", "Pass --task"],
    ),
    "unknown group": (
        nothing, [*TRAIN, "--seeds", "0", "--runs", "acelerated"],
        ["'acelerated'", "'accelerated'?", "Allowed: accelerated", "Pass --runs"],
    ),
    "task that the variant does not run": (
        edited(C, lambda data: data["runs"].update(
            other={**data["runs"]["small"], "variants": ["ftfl"], "budget": {"smoke": [{"tasks": ["dog-run"]}]}}
        )),
        ["train", "--tier", "smoke", "--experiment", "C", "--variant", "mbpo", "--task", "dog-run", "--seeds", "0"],
        ["'dog-run'", "variant 'mbpo'", "Allowed: Hopper-v5, walker-walk", "Pass --task"],
    ),
    "unknown claim": (
        nothing, ["claims", "--explain", "C1z"], ["unknown claim 'C1z'", "'C1'?", "Pass --explain", "`dynarep list`"],
    ),
    "unknown source of runs": (
        nothing, ["claims", "--from", "refernce"], ["source of runs 'refernce'", "'reference'?", "Pass --from"],
    ),
    "two sources of runs": (
        nothing, [*CLAIMS, "--from", "reference", "--results", "elsewhere"],
        ["--results elsewhere: goes without --from reference", "results/reference"],
    ),
    "calibration kept without one": (nothing, [*CLAIMS, "--write"], ["--write: goes with --calibrate"]),
    "calibration without runs": (
        nothing, ["claims", "--calibrate", "--write"],
        ["spread of these gated claims", "'ci'", "C1: 0 of 10 runs", "`make reproduce`"],
    ),
    "calibration of nonsense": (
        lambda home: (home / "experiments/calibration.csv").write_text("claim,tier,rule,seeds,power\nC1,cii,0,one,2\n"),
        PLAN,
        ["calibration.csv is not valid", "line 2: tier", "line 2: seeds", "line 2: spread: is missing"],
    ),
    "seeds in letters": (nothing, [*TRAIN, "--seeds", "a-b"], ["--seeds 'a-b'", "0-4 or 0,2,5-7"]),
    "seeds backwards": (nothing, [*TRAIN, "--seeds", "4-2"], ["--seeds '4-2'", "0-4 or 0,2,5-7"]),
    "seed given twice": (nothing, [*TRAIN, "--seeds", "0,0"], ["--seeds '0,0'", "given twice"]),
    "empty seeds": (nothing, [*TRAIN, "--seeds", ""], ["--seeds ''", "0-4 or 0,2,5-7"]),
    "negative seed": (nothing, [*TRAIN, "--seeds", "-1"], ["--seeds '-1'", "0-4 or 0,2,5-7"]),
    "seeds beyond memory": (nothing, [*TRAIN, "--seeds", "0-999999999"], ["--seeds '0-999999999'", "1000 seeds"]),
    # folders
    "results in the way": (
        in_the_way("results"), [*TRAIN, "--seeds", "0"], ["results/runs: not writable", "Not a directory", "--results"],
    ),
    "figures in the way": (with_runs(lambda folder: in_the_way("figures")(folder.parents[5])), FIGURE,
        ["figures/smoke/madtd: not writable", "Not a directory"],
    ),
    "claims in the way": (
        in_the_way("out"), [*CLAIMS, "--out", "HOME/out/claims.json"], ["out/claims.json: cannot be written"],
    ),
    # runs
    "figure without runs": (
        nothing, FIGURE,
        ["madtd_R1: none of its 4 runs at tier 'smoke'", "`make reproduce TIER=smoke`", "dynarep train"],
    ),
    "figure at a tier without runs": (
        drop(R1, "runs.accelerated.budget.smoke"), FIGURE,
        ["madtd_R1 has no runs at tier 'smoke'", "some at: ci, reduced, paper"],
    ),
    "training at a tier without runs": (
        drop(R1, "runs.accelerated.budget.smoke"), [*TRAIN, "--seeds", "0"],
        ["madtd_R1 has no runs at tier 'smoke'", "some at: ci, reduced, paper"],
    ),
    "run of other code": (
        with_runs(manifest(lambda data: data["code"].update(fingerprint="0" * 64))), [*TRAIN, "--seeds", "0"],
        ["seed=0: was made by other code", "--redo", "--results"],
    ),
    "run of other packages": (
        with_runs(manifest(lambda data: data.update(lock="0" * 64))), [*TRAIN, "--seeds", "0"],
        ["seed=0: was made by other package versions", "--redo", "--results"],
    ),
    "manifest torn, training": (
        with_runs(no_json), [*TRAIN, "--seeds", "0"], ["manifest.json: is not a manifest", "Delete", "seed=0 and run"],
    ),
    "manifest torn, drawing": (with_runs(no_json), FIGURE, ["manifest.json: is not a manifest", "Delete"]),
    "manifest of other form": (
        with_runs(manifest(lambda data: data.update(code="abc"))), [*TRAIN, "--seeds", "0"],
        ["manifest.json: is not a manifest", "Delete"],
    ),
    "manifest without sizes": (
        with_runs(manifest(lambda data: data["files"]["metrics.csv"].pop("bytes"))), FIGURE,
        ["manifest.json: is not a manifest", "Delete"],
    ),
    "manifest with a number that is none": (
        with_runs(manifest(lambda data: data["config"]["agent"].update(lr=float("nan")))), FIGURE,
        ["manifest.json: is not a manifest", "Delete"],
    ),
    "configuration edited": (
        with_runs(manifest(lambda data: data["config"]["agent"].update(lr=0.5))), FIGURE,
        ["manifest.json: its configuration does not hash to its identity", "Move the folder away"],
    ),
    "run in the folder of another seed": (
        with_runs(as_seed_1), FIGURE, ["seed=1/manifest.json: it is seed 0, expected 1", "Move the folder away"],
    ),
    "one digit altered, training": (
        with_runs(one_digit), [*TRAIN, "--seeds", "0"], ["metrics.csv: was altered", "Delete", "run the same command"],
    ),
    "one digit altered, drawing": (with_runs(one_digit), FIGURE, ["metrics.csv: was altered", "Delete"]),
    "metrics gone": (with_runs(no_metrics), FIGURE, ["metrics.csv: cannot be read", "Delete", "run the same command"]),
}  # fmt: skip


def listing(home: Path) -> dict[str, Any]:
    """Every path below; of a file, size, time and hash. (Probing whether a folder is writable touches its time.)"""
    found: dict[str, Any] = {}
    for path in sorted(home.rglob("*")):
        stat = path.lstat()
        content = None
        if path.is_file():
            content = stat.st_size, stat.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(home))] = content
    return found


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_helpful_message_and_leaves_nothing(name, new_home, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    change, arguments, said = CASES[name]
    change(new_home)
    before = listing(new_home)
    with pytest.raises(SystemExit) as stopped:
        cli.main([argument.replace("HOME", str(new_home)) for argument in arguments])
    shown = capsys.readouterr()
    assert stopped.value.code == 2, shown.err
    assert "Traceback" not in shown.err
    assert len(re.findall(rf"^dynarep: |{TYRO}", shown.err, re.MULTILINE)) == 1, f"not one message:\n{shown.err}"
    assert TYRO in shown.err or shown.err.startswith("dynarep: ")
    for per_file in re.split(r"^(?=\S)", shown.err, flags=re.MULTILINE):
        faults = per_file.splitlines()
        assert TYRO in shown.err or len(set(faults)) == len(faults), f"a fault is reported twice:\n{shown.err}"
    assert not shown.out
    missing = [words for words in said if words not in shown.err]
    assert not missing, f"{missing} not in:\n{shown.err}"
    assert listing(new_home) == before, "bad input left something behind"


def test_the_files_that_the_cases_break_are_right_when_left_alone(new_home, capsys):
    """Otherwise a case could pass for a fault that was there before."""
    for arguments in (LIST, PLAN):
        cli.main(arguments)
    with_runs()(new_home)
    cli.main([*TRAIN, "--seeds", "0"])
    assert "1 already there" in capsys.readouterr().out
    assert len(CASES) >= 30
