"""Everything that can be wrong with an experiment file beyond its form: names, budgets, settings, what a claim needs.

All faults of a file are found at once, each with its dotted path and what was allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dynarep import envs, files, published, registration
from dynarep.configs import AgentConfig, PartConfig, ProtocolConfig, registry
from dynarep.errors import UserError, explain, nearest
from dynarep.schema import FEWEST_PAIRS, LINE_STYLES, SUITE, Group, Panel, ResultTable, Shows, budget_model
from dynarep.statements import FEWEST_RANKED, AgreementClaim, Contrast, Judged, Rank, RankClaim

if TYPE_CHECKING:
    from dynarep.experiment import Experiment

ARCHITECTURES = ("mad_td",)  # agents whose module has a function `architecture`
KINDS: tuple[tuple[str, type[PartConfig]], ...] = (("agent", AgentConfig), ("protocol", ProtocolConfig))


def faults(experiment: Experiment) -> list[str]:
    """Return everything wrong with a file that its schema alone cannot see."""
    spec = experiment.spec
    found = _task_faults(experiment)
    for name, variant in spec.variants.items():
        if variant.algorithm:
            found += _unknown(f"variants.{name}.algorithm: unknown agent", [variant.algorithm], registry(AgentConfig))
    for name, group in spec.runs.items():
        before = len(found)
        for word, kind in KINDS:
            found += _unknown(f"runs.{name}.{word}: unknown {word}", [getattr(group, word)], registry(kind))
        found += _unknown(f"runs.{name}.variants: unknown variant", group.variants or (), spec.variants)
        if len(found) == before:
            able = registry(ProtocolConfig)[group.protocol].agents
            what = f"runs.{name}: protocol {group.protocol} cannot run agent"
            found += _unknown(what, experiment.agents(group), able)
        if len(found) == before:
            found += _budget_faults(experiment, name, group)
    protocols = registry(ProtocolConfig)
    if any(group.protocol not in protocols for group in spec.runs.values()):
        return found
    metrics = {metric for group in spec.runs.values() for metric in protocols[group.protocol].metrics}
    resolved, before_pairs = not found, len(found)
    found += _pair_faults(experiment)
    resolved = resolved and len(found) == before_pairs
    for index, panel in enumerate(spec.panels):
        where = f"figure.panels.{index}"
        found += _name_faults(where, panel.variants or (), panel.needs(), experiment, metrics)
        found += _dose_faults(experiment, where, panel)
        found += _style_faults(experiment, where, panel)
        found += _suite_faults(experiment, where, panel)
        found += _scatter_faults(experiment, where, panel) if resolved else ()
        found += _shown_faults(experiment, where, panel) if resolved else ()
    if spec.table:
        found += _table_faults(experiment, spec.table, metrics)
        found += _shown_faults(experiment, "table", spec.table) if resolved else ()
    if resolved and spec.runs:
        found += _variant_task_faults(experiment)
    for claim in spec.judged():
        for side in claim.sides:
            found += _name_faults(f"claims.{claim.id}", [side.variant], [side.metric], experiment, metrics)
        if isinstance(claim, RankClaim):
            found += _rank_faults(experiment, claim, metrics, resolved)
            continue
        found += _unknown(f"claims.{claim.id}.runs: unknown group", claim.runs, spec.runs)
        found += _judging_faults(experiment, claim) if resolved else ()
        found += _theirs_faults(experiment, claim) if resolved else ()
    found += registration.weak(experiment) if not found else ()
    return found


def _unknown(what: str, words: Iterable[str], allowed: Iterable[str]) -> Iterator[str]:
    names = list(allowed)
    for word in words:
        if word not in names:
            yield f"{what} '{word}'.{nearest(word, names)}"


def _name_faults(
    where: str, variants: Sequence[str], metrics: Sequence[str], experiment: Experiment, known: set[str]
) -> Iterator[str]:
    yield from _unknown(f"{where}.variant: unknown variant", variants, experiment.spec.variants)
    yield from _unknown(f"{where}.metrics: unknown metric", metrics, known)


def _table_faults(experiment: Experiment, table: ResultTable, metrics: set[str]) -> Iterator[str]:
    """Check the names in a table; of hyperparameters, also what the variants say they change."""
    if table.kind == "returns":
        yield from _name_faults("table", table.variants or (), [table.metric], experiment, metrics)
        return
    if table.kind == "architecture":
        yield from _unknown("table.agents: no architecture of", table.agents, ARCHITECTURES)
        return
    for word, kind in KINDS:
        named = getattr(table, f"{word}s")
        yield from _unknown(f"table.{word}s: unknown {word}", named, registry(kind))
        fields = {field for name in named if name in registry(kind) for field in registry(kind)[name].model_fields}
        for name, variant in experiment.spec.variants.items():
            yield from _unknown(f"variants.{name}.{word}: unknown key", getattr(variant, word), fields)


def _dose_faults(experiment: Experiment, where: str, panel: Panel) -> Iterator[str]:
    """Check that a dose panel has doses to draw."""
    if panel.kind != "dose":
        return
    variants = experiment.spec.variants
    doses = {name: variants[name].dose for name in experiment.shown(panel) if name in variants}
    for name, dose in doses.items():
        if dose is None:
            yield f"{where}.variants: '{name}' has no dose. Write 'dose:' under variants.{name}."
        elif panel.x_scale == "log" and dose <= 0:
            yield f"{where}.x_scale: log, but the dose of '{name}' is {dose:g}. Write a positive one, or 'linear'."
    if not doses:
        yield f"{where}: a dose panel needs variants with a dose. Write 'dose:' under some of variants."


def _style_faults(experiment: Experiment, where: str, panel: Panel) -> Iterator[str]:
    """Check that variants that share a colour can be told apart."""
    if panel.colour_by != "series":
        return
    variants = experiment.spec.variants
    of = [variants[name].series for name in experiment.shown(panel) if name in variants]
    for series in dict.fromkeys(filter(None, of)):
        if of.count(series) > LINE_STYLES:
            what = f"{of.count(series)} variants of series '{series}', but only {LINE_STYLES} line styles"
            yield f"{where}.colour_by: {what}. Write fewer under 'variants', or another 'series:' under some of them."


def _suite_faults(experiment: Experiment, where: str, panel: Panel) -> Iterator[str]:
    """Check that the arm that is compared with the others is among several."""
    if panel.kind not in SUITE or not panel.of:
        return
    shown = experiment.shown(panel)
    yield from _unknown(f"{where}.of: unknown variant", [panel.of], shown)
    if len(shown) < 2:
        yield f"{where}.variants: '{panel.of}' alone has nothing to improve on. Write another one."


def _pair_faults(experiment: Experiment) -> Iterator[str]:
    """Check the pairs' names, and that each of their variants runs in one group at most: else which run is meant?"""
    spec = experiment.spec
    if spec.pairs and len(spec.pairs) < FEWEST_PAIRS:
        yield f"pairs: {len(spec.pairs)}, but fewer than {FEWEST_PAIRS} have no order to speak of."
    labels = [pair.label for pair in spec.pairs]
    for label in dict.fromkeys(label for label in labels if labels.count(label) > 1):
        yield f"pairs: {labels.count(label)} of them have the label '{label}'. Write labels that tell them apart."
    for index, pair in enumerate(spec.pairs):
        for key in ("predictor", "of", "to"):
            yield from _unknown(f"pairs.{index}.{key}: unknown variant", [getattr(pair, key)], spec.variants)
    paired = {name for pair in spec.pairs for name in pair.variants}
    for tier in experiment.tiers():
        running: dict[str, list[str]] = {}
        for name, group in spec.runs.items():
            for variant in group.variants or spec.variants if tier in group.budget else ():
                running.setdefault(variant, []).append(name)
        for variant, groups in running.items():
            if variant in paired and len(groups) > 1:
                what = f"'{variant}' runs in several groups at tier {tier}: {', '.join(groups)}"
                yield f"pairs: {what}. Give each of them variants of its own, under 'variants:' there."


def _scatter_faults(experiment: Experiment, where: str, panel: Panel) -> Iterator[str]:
    """Check that a scatter has pairs, and says what a claim of the same ranks says."""
    if panel.kind != "scatter":
        return
    if not experiment.spec.pairs:
        yield f"{where}: a scatter shows the experiment's pairs, and there are none. Write 'pairs:'."
    (metric,) = panel.metrics
    for claim in experiment.spec.judged():
        contrast = claim.contrast
        same = isinstance(contrast, Rank) and (contrast.predictor, contrast.outcome) == (metric, panel.outcome)
        if isinstance(contrast, Rank) and same and contrast.average != panel.average:
            theirs = f"claims.{claim.id}.contrast.average is {contrast.average}"
            yield f"{where}.average: {panel.average}, but {theirs}, of the same metrics. Write the same."
    yield from _recorded_faults(experiment, where, metric, panel.outcome)


def _recorded_faults(experiment: Experiment, where: str, predictor: str, outcome: str) -> Iterator[str]:
    """Check that the protocols that the pairs' variants run under record what is read of them."""
    for pair in experiment.spec.pairs:
        for variant, metric in ((pair.predictor, predictor), (pair.of, outcome), (pair.to, outcome)):
            for group in experiment.spec.runs.values():
                known = registry(ProtocolConfig)[group.protocol].metrics
                if variant in (group.variants or (variant,)) and metric not in known:
                    what = f"'{variant}' of pair '{pair.label}' runs under {group.protocol}, which has no '{metric}'"
                    yield f"{where}: {what}.{nearest(metric, known)}"


def _rank_faults(experiment: Experiment, claim: RankClaim, known: set[str], resolved: bool) -> Iterator[str]:
    """Check that a claim of ranks has metrics, and at every tier that is to judge it enough pairs with all runs."""
    where, contrast, pairs = f"claims.{claim.id}", claim.contrast, experiment.spec.pairs
    before = len(names := list(_name_faults(where, [], [contrast.predictor, contrast.outcome], experiment, known)))
    yield from names
    if len(pairs) < FEWEST_RANKED:
        yield f"{where}.contrast: {FEWEST_RANKED} settings can say something at the least; 'pairs:' has {len(pairs)}."
    if before or not resolved or not pairs:
        return
    yield from _recorded_faults(experiment, f"{where}.contrast", contrast.predictor, contrast.outcome)
    for tier in (str(tier) for tier in claim.tiers if claim.role(str(tier)) != "untested"):
        by_pair = experiment.pair_jobs(tier)
        for pair in pairs:
            jobs = by_pair[pair.label]
            seeds = [
                {(job.task, seed) for job in jobs if job.variant == arm for seed in job.seeds}
                for arm in (pair.of, pair.to)
            ]
            what = f"{where}.tiers.{tier}: {claim.role(tier)}, but of pair '{pair.label}'"
            if absent := set(pair.tasks or ()) - {job.task for job in jobs}:
                yield f"{what} not all of {', '.join(pair.variants)} run {', '.join(sorted(absent))} there."
            elif not jobs:
                yield f"{what} {', '.join(pair.variants)} share no task there."
            elif {task for task, _ in seeds[0] & seeds[1]} != {job.task for job in jobs}:
                yield f"{what} '{pair.of}' and '{pair.to}' share no seed there."


def _shown_faults(experiment: Experiment, where: str, part: Shows) -> Iterator[str]:
    """Check that the published numbers of a panel or table are there, and one for each of its lines and tasks."""
    if part.published is False:
        return
    known = published.read(experiment.folder)
    if part.published is not True:
        names = {row.algorithm for row in known}
        yield from _unknown(f"{where}.published: unknown algorithm", part.published, names)
        known = [row for row in known if row.algorithm in part.published]
    steps = {row.env_step for row in known}
    if part.published_step and steps and part.published_step not in steps:
        yield f"{where}.published_step: no number at {part.published_step}. There are some at: {_listed(steps)}."
    tasks = {job.task for tier in part.published_tiers for job in experiment.jobs(tier)}
    drawn = published.shown(experiment.folder, part, tasks)
    if not (isinstance(part, Panel) and part.kind == "curves") and (twice := published.several(drawn, "label")):
        yield f"{where}.published_step: is missing. {twice}"


def _theirs_faults(experiment: Experiment, claim: Judged) -> Iterator[str]:
    """Check that a published number that a claim compares with is there, for enough tasks of every judging tier."""
    theirs, where = claim.theirs, f"claims.{claim.id}"
    if theirs is None:
        return
    known = [row for row in published.read(experiment.folder) if row.task != published.SEVEN]
    steps = {row.env_step for row in known if row.algorithm == theirs.published}
    if not steps:
        names = {row.algorithm for row in known}
        yield from _unknown(f"{where}.contrast.to.published: unknown algorithm", [theirs.published], names)
        return
    if theirs.env_step not in steps:
        what = f"no number of '{theirs.published}' at {theirs.env_step}. There are some at: {_listed(steps)}."
        yield f"{where}.contrast.to.env_step: {what}"
        return
    for tier in (str(tier) for tier in claim.tiers if claim.role(str(tier)) != "untested"):
        ours = {job.task for job in experiment.judging_jobs(claim, tier)}
        try:
            numbers = published.means(experiment.folder, theirs.published, theirs.env_step, ours)
        except UserError as error:
            yield f"{where}.contrast.to.published: {error}"
            return
        if ours and not numbers:
            there = _listed({row.task for row in known if row.algorithm == theirs.published})
            yield f"{where}.tiers.{tier}: no task there has the published number. It is given for: {there}."
        elif isinstance(claim, AgreementClaim):
            yield from _agreement_faults(claim, tier, numbers)


def _agreement_faults(claim: AgreementClaim, tier: str, numbers: Mapping[str, published.Published]) -> Iterator[str]:
    where, contrast = f"claims.{claim.id}.contrast", claim.contrast
    if contrast.needed > len(numbers):
        yield f"{where}.needed: {contrast.needed}, but tier {tier} has {len(numbers)} tasks with the published number."
    coarsest = max((row.reading_error or 0.0 for row in numbers.values()), default=0.0)
    if contrast.margin < coarsest:
        yield f"{where}.margin: {contrast.margin:g}, but the numbers have a reading error of {coarsest:g}."


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted(values)))


def _task_faults(experiment: Experiment) -> list[str]:
    """Refuse a task among the settings: it would be overridden without a word."""
    settings = {f"runs.{name}.settings": group.settings for name, group in experiment.spec.runs.items()}
    settings |= {f"variants.{name}": variant for name, variant in experiment.spec.variants.items()}
    return [
        f"{place}.environment.{key}: comes from the budget. Write it under 'tasks' there."
        for place, part in settings.items()
        for key in part.environment
        if key in ("suite", "task")
    ]


def _variant_task_faults(experiment: Experiment) -> Iterator[str]:
    """Refuse a variant's task that no tier ever runs: a slip would leave the variant out without a word."""
    budgets = [
        experiment.budget(group, str(tier), index)
        for group in experiment.spec.runs.values()
        for tier in group.budget
        for index in range(len(group.blocks(str(tier))))
    ]
    known = {task for budget in budgets for task in budget.get("tasks", ())}
    for name, variant in experiment.spec.variants.items():
        yield from _unknown(f"variants.{name}.tasks: in no budget:", variant.tasks or (), known)


def _judging_faults(experiment: Experiment, claim: Judged) -> Iterator[str]:
    """Check that every tier that is to judge a claim has the runs for it."""
    spec, where, ran = experiment.spec, f"claims.{claim.id}", set()
    judging = [str(tier) for tier in claim.tiers if claim.role(str(tier)) != "untested"]
    for tier in judging:
        judging_groups = experiment.judging_groups(claim, tier)
        if not judging_groups:
            groups = [name for name, other in spec.runs.items() if tier in other.budget]
            why = f"no group has runs at this tier. There are some at: {', '.join(experiment.tiers())}."
            if groups:
                why = f"several groups have such runs at this tier. Write 'runs:' with one of: {', '.join(groups)}."
            yield f"{where}.tiers.{tier}: {claim.role(tier)}, but {why}"
            continue
        jobs = [job for job in experiment.jobs(tier) if job.group in judging_groups]
        variants = {job.variant for job in jobs}
        sides = [side.variant for side in claim.sides]
        absent = [side for side in sides if side in set(spec.variants) - variants]
        for side in absent:
            yield f"{where}.variant: '{side}' is not among those of {_runs(judging_groups)}.{nearest(side, variants)}"
        ran |= {job.task for job in jobs}
        judging_jobs = experiment.judging_jobs(claim, tier) if not absent else []
        if not absent and not judging_jobs:
            yield f"{where}.tiers.{tier}: no task of the claim is run by {' and '.join(dict.fromkeys(sides))} there."
        elif judging_jobs and isinstance(claim.contrast, Contrast) and claim.contrast.across:
            seeds = [
                [seed for job in judging_jobs if (job.variant, job.task) == (s.variant, s.task) for seed in job.seeds]
                for s in claim.sides
            ]
            if seeds[0] != seeds[1]:
                yield f"{where}.tiers.{tier}: both tasks need runs of the same seeds there, for pairs."
    if isinstance(claim.contrast, Contrast) and claim.contrast.units:
        for task in ran & set(claim.contrast.tasks or ran) - set(claim.contrast.units):
            yield f"{where}.contrast.units: none for '{task}'. Write one for every task that judges the claim."
    assert not isinstance(claim.contrast, Rank)  # it is checked by its pairs
    for task in set(claim.contrast.tasks or ()) - ran if ran else ():
        yield f"{where}.contrast.tasks: '{task}' has no runs at {', '.join(judging)}.{nearest(task, ran)}"


def _runs(groups: Iterable[str]) -> str:
    return ", ".join(f"runs.{group}" for group in groups)


def _budget_faults(experiment: Experiment, name: str, group: Group) -> list[str]:
    """Check each tier's budget and resolve every run once."""
    found: list[str] = []
    agents = experiment.agents(group)
    usable = {"tasks", "seeds", "first_seed", "seeds_per_job"} | registry(ProtocolConfig)[group.protocol].budget
    usable |= {key for agent in agents for key in registry(AgentConfig)[agent].budget}
    for tier, blocks in group.budget.items():
        for index, block in enumerate(blocks):
            where = f"runs.{name}.budget.{tier}.{index}."
            before = len(found)
            owner = f"not a budget key of {', '.join(agents)} and {group.protocol}"
            found += [f"{where}{key}: {owner}.{nearest(key, usable)}" for key in block if key not in usable]
            try:
                budget_model().model_validate(only(block, usable))
            except ValidationError as error:
                found += explain(error, budget_model(), where)
            if len(found) == before:
                found += _run_faults(experiment, name, group, str(tier), index, where)
    return found


def _run_faults(experiment: Experiment, name: str, group: Group, tier: str, index: int, where: str) -> list[str]:
    budget = experiment.budget(group, tier, index)
    found = [f"{where}{key}: is missing." for key in ("tasks", "seeds") if not budget.get(key)]
    for task in budget.get("tasks", ()):
        for variant in group.variants or tuple(experiment.spec.variants):
            try:
                parts = experiment.parts(group, variant, budget, task)
            except envs.EnvError as error:
                found.append(f"{where}tasks: {error}")
                continue
            for section, (part, values) in parts.items():
                try:
                    part.model_validate(values)
                except ValidationError as error:
                    budgeted = part.budget if issubclass(part, PartConfig) else ()
                    places = {
                        f"variants.{variant}.{section}.": getattr(experiment.spec.variants[variant], section),
                        where: only(group.blocks(tier)[index], budgeted),
                        f"tiers/{tier}.yaml: budget.": only(files.tier_in(experiment.folder, tier).budget, budgeted),
                        f"runs.{name}.settings.{section}.": getattr(group.settings, section),
                    }
                    found += explain(error, part, partial(_place, places, where))
    return found


def _place(places: Mapping[str, Mapping[str, Any]], otherwise: str, key: str) -> str:
    """Return the first place that sets a key."""
    return next((place for place, values in places.items() if key in values), otherwise)


def only(values: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Return the part of a mapping with these keys."""
    wanted = set(keys)
    return {key: value for key, value in values.items() if key in wanted}
