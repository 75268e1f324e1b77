"""The report: each test names what a reader, a browser or an archive would stumble over if it failed."""

import base64
import hashlib
import json
import math
import re
import shlex
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

import paired
import synthetic
from dynarep import claims, cli, records, report, run
from dynarep.experiment import Experiment, find, load_all
from dynarep.report import made
from dynarep.report.words import cpu_time
from dynarep.statements import TIERS

VOID = {"meta", "br", "img", "link", "input", "hr", "area", "base", "col", "embed", "source", "track", "wbr"}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="300pt" height="200pt"><g id="axes_1"></g></svg>'
METRICS = f"{','.join(records.COLUMNS)}\n96,192,16,diverged,0\n96,192,32,diverged,0\n"
HOSTILE = '<script>alert("x")</script>'


class Page(HTMLParser):
    """A page's elements, identifiers, links and text; fails on tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.raw, self.words = [], [], {"script": [], "style": []}, []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}> at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]].append(data)
        else:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def experiments():
    """Two, however many there are by now."""
    everything = load_all()
    return [find(everything, key) for key in ("ftfl_C", "madtd_R1")]


@pytest.fixture(scope="module")
def trained(experiments, tmp_path_factory):
    """R1's runs of the smoke tier, with real manifests but made-up metrics; nothing else is there."""
    folder = tmp_path_factory.mktemp("trained")
    for job in find(experiments, "madtd_R1").jobs("smoke"):
        cost = {"wall_s": 2.0, "cpu_s": 3.0, "peak_mib": 400, "seeds_in_job": len(job.seeds)}
        for seed, place in zip(job.seeds, job.folders(), strict=True):
            manifest = run._manifest(job, cost, [], "2026-01-01T00:00:00+00:00")
            records.write(folder / place, METRICS, manifest | {"seed": seed})
    return folder


@pytest.fixture
def results(trained, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(trained, tmp_path / "runs")


@pytest.fixture
def figures(tmp_path):
    """Stand-ins for two figures, with the same identifiers inside."""
    for place in ("madtd/R1", "ftfl/C"):
        path = tmp_path / "figures" / "smoke" / f"{place}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SVG)
    return tmp_path / "figures"


@pytest.fixture(scope="module")
def verdicts(experiments, trained):
    """One of each kind, the rest untested."""
    found = claims.judge_all(experiments, "smoke", trained)
    tasks = {"walker-walk": (2.0, 1.7, 2.3), "dog-stand": (7.3, 5.4, 9.9)}
    measured = {"estimate": 1.953, "low": 1.5, "high": 2.5, "bootstrap": (1.6, 2.4), "p": 0.0002, "p_holm": 0.0123}
    measured |= {"n": 10, "planned": 10, "tasks": list(tasks), "per_task": tasks, "diverged": 3, "reason": "because"}
    kinds = [("supported", True), ("contradicted", False), ("inconclusive", True)]
    for place, (kind, gated) in enumerate(kinds):
        role = "gated" if gated else "reported"
        found[place] = replace(found[place], verdict=kind, gated=gated, role=role, **measured)
    return found


@pytest.fixture
def build(experiments, results, figures, verdicts):
    """Build the page, with some inputs replaced."""

    def page(**other):
        inputs = {"experiments": experiments, "tier": "smoke", "verdicts": verdicts}
        return report.build(**{**inputs, "results": results, "figures": figures, **other})

    return page


def edit_manifest(results, change, seeds="seed=1"):
    """Change the manifests of one seed of every arm."""
    for path in results.glob(f"*/*/*/{seeds}/manifest.json"):
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))


# -- what is there ------------------------------------------------------------------------------------------------


def test_no_claim_and_no_experiment_is_left_out(build, results):
    experiments = load_all()
    page = Page(build(experiments=experiments, verdicts=claims.judge_all(experiments, "smoke", results)))
    text = page.text
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    for experiment in experiments:
        spec = experiment.spec
        assert f"exp-{experiment.key}" in ids
        for words in (spec.title, spec.reproduces, spec.caption, *spec.deviations):
            assert words in text
        for claim in spec.claims:
            assert f"claim-{claim.id}" in ids
            for words in (claim.says, claim.published, claim.source, claim.why):
                assert words in text


def test_a_verdict_shows_number_interval_reason_and_word(build, verdicts):
    page = Page(build())
    first = verdicts[0]
    for words in ("1.95 [1.5, 2.5]", "[1.6, 2.4]", "< 0.001", "0.012", "n = 10 × 2 tasks", "7.3", "[5.4, 9.9]"):
        assert words in page.text, words
    assert f"{first.claim} {first.says}" in page.text
    for word, symbol in report.VERDICTS.items():
        assert f"{symbol} {word}" in page.text, "a verdict must not be told by colour alone"


def test_the_tally_counts_every_verdict(build, verdicts):
    rest = len(verdicts) - 3
    tally = f"1 supported, 1 contradicted, 1 inconclusive, {rest} untested; gated claims: 1 of 2 supported"
    assert tally in Page(build()).text
    assert report.tally([]) == "no claims; no gated claims"


def test_verdicts_of_other_code_carry_a_warning(build, verdicts):
    verdicts = [replace(v, stale=v.claim == verdicts[0].claim) for v in verdicts]
    assert f"The runs behind {verdicts[0].claim} were made by other code" in Page(build(verdicts=verdicts)).text
    assert "were made by other code" not in Page(build()).text


@pytest.mark.parametrize(
    ("registered", "explained", "warned"),
    [
        ("yes", "yes: every run behind it was made under this very rule", False),
        ("no", "no: it was written or changed after a run behind it was made", True),
        ("unknown", "not recorded by a run behind it", False),
        ("", None, False),
    ],
)
def test_a_rule_younger_than_its_runs_is_said_where_the_verdict_stands(build, verdicts, registered, explained, warned):
    verdicts = [replace(v, registered=registered if place == 0 else "") for place, v in enumerate(verdicts)]
    text = Page(build(verdicts=verdicts)).text
    assert ("Rule in force before the runs" in text) == (explained is not None)
    assert explained is None or explained in text
    assert (f"The rule of {verdicts[0].claim} was written or changed after runs that judge it" in text) == warned
    assert text.count("rule younger than its runs") == warned


def test_a_claim_says_which_tiers_can_judge_it(build, experiments, verdicts):
    """The filter goes by it: a claim that a tier is left out of would be hidden there."""
    rows = {a["id"]: a["data-tier"].split() for a in Page(build()).all("tbody") if "data-tier" in a}
    for claim in (c for e in experiments for c in e.spec.claims):
        able = [tier for tier in TIERS if claim.role(tier) != "untested"] or ["none"]
        here = ["here"] * (next(v for v in verdicts if v.claim == claim.id).verdict != "untested")
        assert rows[f"claim-{claim.id}"] == here + able, claim.id
    assert sum("here" in tiers for tiers in rows.values()) == 3


def test_a_verdict_leads_to_figure_and_runs_that_are_there_and_to_no_others(build, figures, tmp_path):
    links = {a["href"] for a in Page(build()).all("a")}
    assert {"#figure-madtd_R1", "#runs-madtd_R1", "#figure-ftfl_C"} <= links
    (figures / "smoke/ftfl/C.svg").unlink()
    links = {a["href"] for a in Page(build()).all("a")}
    assert "#figure-ftfl_C" not in links
    assert "#figure-madtd_R1" in links


def test_every_run_leads_to_its_manifest_from_wherever_the_page_lies(build, experiments, results, tmp_path):
    jobs = find(experiments, "madtd_R1").jobs("smoke")
    manifests = {results / place / records.MANIFEST for job in jobs for place in job.folders()}
    gone = manifests.pop()
    gone.unlink()
    for page in (None, tmp_path / "other" / "deep" / "page.html"):
        folder = (page or results / "report" / "page.html").parent
        folder.mkdir(parents=True)
        links = [a["href"] for a in Page(build(page=page)).all("a") if a["href"].endswith(records.MANIFEST)]
        assert {(folder / unquote(link)).resolve() for link in links} == manifests
        assert len(links) == len(manifests)


def test_what_was_drawn_can_be_opened_and_only_what_is_there(build, figures, results):
    (figures / "smoke/madtd/R1.csv").write_text("x")
    links = [a["href"] for a in Page(build()).all("a") if a["href"].startswith("..") and "figures" in a["href"]]
    found = {(results / "report" / link).resolve() for link in links}
    assert found == {figures / "smoke" / name for name in ("madtd/R1.csv", "madtd/R1.svg", "ftfl/C.svg")}


def test_a_picture_of_many_arms_is_not_described_for_a_minute(build, new_home):
    variants = {f"m{k}": {**synthetic.TRIAL["variants"]["mbpo"], "label": f"arm number {k}"} for k in range(9)}
    figure = {"panels": [{"kind": "final", "metrics": {"return/final": "r"}, "label": "r"}]}
    for count, words in ((8, "Arms: arm number 0, arm number 1,"), (9, "Arms: 9 arms, named below.")):
        some = dict(list(variants.items())[:count])
        experiment = synthetic.trial(new_home, variants=some, figure=figure, claims=[])
        assert words in report._alt(experiment, "smoke", experiment.jobs("smoke")), count


def test_without_known_deviations_the_reductions_are_all(build, new_home):
    text = Page(build(experiments=[synthetic.trial(new_home, claims=[])], verdicts=[])).text
    assert "Deviations from the paper None is known besides the reductions above." in text


def test_what_a_tier_changes_is_listed_beside_the_default(build):
    text = Page(build()).text
    assert "width 16 512 this tier" in text
    assert "discount 0.97 0.99 the experiment" in text
    assert "model_fraction 0.05" in text, "what an arm sets"


def test_the_strip_places_the_interval_between_its_neighbours(experiments, verdicts):
    claim = next(c for e in experiments for c in e.spec.claims if c.id == verdicts[0].claim)
    strip = report._strip(verdicts[0], claim)
    assert strip["no_effect"] < strip["low"] < strip["estimate"] < strip["high"]
    assert min(strip.values()) >= 0
    assert max(strip.values()) <= 100
    equal = next(c for e in experiments for c in e.spec.claims if c.direction == "equal" and c.contrast.kind == "ratio")
    strip = report._strip(verdicts[0], equal)
    assert strip["near"] + strip["far"] == pytest.approx(2 * strip["no_effect"], abs=0.05), "ratios: a log scale"
    assert report._strip(replace(verdicts[0], low=-math.inf), claim) is None
    assert report._strip(replace(verdicts[0], estimate=None), claim) is None


# -- a browser without a network ----------------------------------------------------------------------------------


def test_nothing_is_loaded_from_outside_the_file(build):
    page = Page(build())
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        for name, value in attributes.items():
            if name in ("src", "srcset", "poster", "data", "xlink:href", "action", "background"):
                assert name == "src", f"{tag} {name}"
                assert (value or "").startswith("data:"), f"{tag} {name}={value[:60]}"
            if name == "href" and tag == "image":
                assert value.startswith("data:"), value[:60]
            elif name == "href":
                assert tag in ("a", "use"), tag
                assert re.match(r"#|(\.\./)+[^/]", value or ""), "a link elsewhere than into the page and its folders"
            assert not name.startswith("on"), f"{tag} {name}: the policy would block it"
    loaded = "".join(page.raw["style"] + page.raw["script"])
    for word in ("@import", "url(", "//", "import(", "fetch", "XMLHttpRequest"):
        assert word not in loaded, word


def test_the_policy_lets_the_pages_own_script_run_and_no_other(build):
    page = Page(build())
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    (script,) = page.raw["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_tags_balance_and_every_anchor_has_one_target(build):
    page = Page(build())
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert [name for name, n in ids.items() if n > 1] == []
    for a in page.all("a"):
        assert a["href"][0] == "." or a["href"][1:] in ids, a["href"]
    for _, attributes in page.elements:
        for name in ("aria-labelledby", "aria-controls", "aria-describedby", "for"):
            assert attributes.get(name) is None or attributes[name] in ids, attributes


def test_figures_keep_their_identifiers_to_themselves_and_can_be_heard(build, experiments):
    text = build()
    images = Page(text).all("img")
    assert len(images) == 2
    assert "axes_1" not in text
    for image, experiment in zip(images, experiments, strict=True):
        assert base64.b64decode(image["src"].partition("base64,")[2]).decode() == SVG
        assert image["width"] == "400"
        assert experiment.spec.title in image["alt"]
        assert all(panel.label in image["alt"] for panel in experiment.spec.figure.panels)


def test_tables_can_be_read_by_a_screen_reader(build):
    page = Page(build())
    names = Counter(tag for tag, _ in page.elements)
    assert names["table"] == names["caption"] == names["thead"] > 3
    assert all("scope" in attributes for attributes in page.all("th"))
    assert all(attributes.get("type") == "button" for attributes in page.all("button"))
    assert "hidden" in next(a for a in page.all("div") if a.get("id") == "filters"), "useless without the script"
    assert not any("hidden" in a for a in page.all("tbody")), "without the script everything is shown"


def test_text_from_files_never_becomes_markup(build, results, verdicts, experiments):
    edit_manifest(results, lambda m: m["code"].update(commit=HOSTILE))
    edit_manifest(results, lambda m: m["machine"].update(cpu=HOSTILE), "seed=0")
    spec = experiments[0].spec.model_copy(update={"title": HOSTILE, "caption": f'"{HOSTILE}'})
    page = Page(
        build(
            verdicts=[replace(verdicts[0], reason=HOSTILE, says=f"'{HOSTILE}"), *verdicts[1:]],
            experiments=[Experiment(experiments[0].file, spec), *experiments[1:]],
        )
    )
    assert len(page.all("script")) == 1
    assert page.text.count(HOSTILE) >= 6
    assert any(HOSTILE in image["alt"] for image in page.all("img")), "the attribute did not hold"


def test_an_argument_has_no_numbers_and_a_reason(build, new_home, results):
    experiment = synthetic.trial(new_home)
    page = Page(build(experiments=[experiment], verdicts=claims.judge_all([experiment], "smoke", results)))
    assert "Why no experiment judges it no run can judge it" in page.text
    assert "○ untested not empirical not empirical: no run can judge it" in page.text
    assert page.text.count("Claimed direction") == 1


AGREEMENT = {"kind": "agreement", "margin": 0, "widest": 30, "needed": 1}
EFFECT = {"direction": "less", "no_effect": 0, "smallest": -50}


@pytest.mark.parametrize(
    ("contrast", "effect", "column", "explained"),
    [
        (AGREEMENT, {}, "Ours", "When a task agrees our 95 % interval overlaps the published number, give or take 0"),
        ({"kind": "difference"}, EFFECT, "Estimate", "Claimed direction less than no effect"),
    ],
)
def test_a_published_number_stands_beside_ours(build, new_home, tmp_path, contrast, effect, column, explained):
    claim = {key: synthetic.TRIAL["claims"][0][key] for key in ("id", "says", "source", "published", "why", "unit")}
    of = {"variant": "mbpo", "metric": "return/final"}
    claim["contrast"] = {"of": of, "to": {"published": "BRO, UTD 10", "env_step": 500000}, **contrast}
    experiment = synthetic.trial(new_home, claims=[claim | effect | {"tiers": {"paper": "reported"}}])
    synthetic.write_runs(experiment, "paper", tmp_path / "runs", lambda *a: 290.0 + 7 * a[2])
    (v,) = claims.judge_all([experiment], "paper", tmp_path / "runs")
    text = Page(build(experiments=[experiment], tier="paper", verdicts=[v], results=tmp_path / "runs")).text
    ours, low, high = (report.number(x) for x in v.per_task["hopper-hop"])
    assert f"Task {column} 95 % interval Published hopper-hop {ours} [{low}, {high}] 299 " in text
    assert "Compared with BRO, UTD 10, action repeat 2 (SimbaV2) at step 500000" in text
    assert "without quadruped-walk, Hopper-v5 (no number of BRO, UTD 10 at step 500000): " in text
    assert explained in text
    assert "Why no experiment judges it" not in text


@pytest.fixture
def ranked(new_home, tmp_path):
    """The paired experiment with its runs at the ci tier; the keyword arguments of `build`."""
    experiment = paired.load(new_home)
    synthetic.write_runs(experiment, "ci", tmp_path / "ranked", paired.help_by([-1, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6]))
    found = claims.judge_all([experiment], "ci", tmp_path / "ranked")
    return {"experiments": [experiment], "tier": "ci", "verdicts": found, "results": tmp_path / "ranked"}


def test_a_claim_of_ranks_counts_settings_and_lists_every_one(build, ranked):
    page = Page(build(**ranked))
    (v,) = ranked["verdicts"]
    for words in (
        "Settings 6 of 6 planned",
        "Bootstrap interval over settings [1, 1]",
        "p, two-sided, by permutation 0.003",
    ):
        assert words in page.text, words
    assert f"1 [{v.low:.3g}, 1] Spearman's rank correlation n = 6 settings" in page.text
    assert "Setting reward/nmse 95 % interval return/final, difference 95 % interval reward x 1/1 1 [" in page.text
    label, numbers = list(v.settings.items())[-1]
    x, x_low, x_high, y, y_low, y_high = map(report.number, numbers)
    assert f"{label} {x} [{x_low}, {x_high}] {y} [{y_low}, {y_high}]" in page.text
    assert sum("strip" in (a.get("class") or "") for a in page.all("svg")) == 1


def test_a_claim_of_ranks_without_all_runs_shows_how_many_settings_there_are(build, ranked):
    next(ranked["results"].glob("ensemble/*/*/seed=1/manifest.json")).unlink()
    found = claims.judge_all(ranked["experiments"], "ci", ranked["results"])
    text = Page(build(**ranked | {"verdicts": found})).text
    assert "5 of 6 settings have all their runs. 2 of 3 runs of 'fit_" in text
    assert "Settings 5 of 6 planned" in text
    assert "per setting" not in text


# -- dial tasks ---------------------------------------------------------------------------------------------------

EXPLAINS = {"turned": "The unit.", "happened": "It broke.", "says": f"Units matter {HOSTILE}.", "beside": ["R1", "C"]}


@pytest.fixture
def dials(new_home, experiments, figures):
    """A dial experiment beside two others; figures of all three, each of its own."""
    for place in ("madtd/R1", "ftfl/C", "beyond/Y1"):
        path = figures / "smoke" / f"{place}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SVG.replace("axes_1", place))
    return [*experiments, synthetic.trial(new_home, explains=EXPLAINS)]


def drawn(image):
    """Return which figure an image is."""
    uri = image.get("src") or image["href"]
    return re.search('id="([^"]+)"', base64.b64decode(uri.partition("base64,")[2]).decode())[1]


def test_a_dial_task_stands_beside_the_diagnostics_that_it_should_explain(build, dials, results):
    verdicts = claims.judge_all(dials, "smoke", results)
    text = build(experiments=dials, verdicts=verdicts)
    section = text[text.index('<section id="dials"') : text.index("<article")]
    inner = Page(section)
    assert [drawn(image) for image in inner.all("img")] == ["beyond/Y1"]
    stored = {f"#{image['id']}": drawn(image) for image in inner.all("image")}
    assert [stored[use["href"]] for use in inner.all("use")] == ["madtd/R1", "ftfl/C"]
    shown = [svg for svg in inner.all("svg") if svg.get("role") == "img"]
    assert [svg["aria-label"].split(" at ")[0] for svg in shown] == ["Figure R1", "Figure C"]
    assert {(svg["viewbox"], svg["width"]) for svg in shown} == {("0 0 400 267", "400")}
    words = inner.text
    assert report.DIALS in words
    assert (
        f"What was turned. The unit. What happened. It broke. What it says about the paper, and what not. "
        f"Units matter {HOSTILE}."
    ) in words
    for experiment in dials[:2]:
        line = f'Real-benchmark diagnostic. <a href="#exp-{experiment.key}">{experiment.spec.id}: '
        assert line in section
    assert "Y1: runs, arms, deviations . Claims: Z1 ○ untested ; Z2 ○ untested" in words
    page = Page(text)
    assert len(page.all("script")) == 1
    assert any(a["href"] == "#dials" for a in page.all("a")), "in the contents"
    # its own section keeps everything but the figure, which is there once
    assert [drawn(image) for image in page.all("img")].count("beyond/Y1") == 1
    assert "Its figure stands beside the diagnostics that it should explain ." in page.text
    assert page.text.count(dials[2].spec.caption) == 1


def test_a_figure_that_stands_beside_several_dial_tasks_is_stored_once(build, dials, new_home):
    """Otherwise the page grows with every dial task by all of its neighbours."""
    again = synthetic.trial(new_home, id="Y2", explains=EXPLAINS, claims=[])
    page = Page(build(experiments=[*dials, again], verdicts=[]))
    assert [drawn(image) for image in page.all("image")] == ["madtd/R1", "ftfl/C"]
    assert len(page.all("use")) == 4
    assert [drawn(image) for image in page.all("img")] == ["beyond/Y1", "ftfl/C", "madtd/R1"]


def test_a_figure_that_does_not_say_its_size_still_stands_beside(build, dials, figures):
    (figures / "smoke/madtd/R1.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><g id="sizeless"></g></svg>')
    page = Page(build(experiments=dials, verdicts=[]))
    assert [drawn(image) for image in page.all("img")].count("sizeless") == 2
    assert len(page.all("use")) == 1


def test_the_section_of_dial_tasks_is_as_sound_as_the_rest_of_the_page(build, dials, results):
    text = build(experiments=dials, verdicts=claims.judge_all(dials, "smoke", results))
    test_nothing_is_loaded_from_outside_the_file(lambda: text)
    page = Page(text)
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert max(ids.values()) == 1
    assert all(a["href"][1:] in ids for a in page.all("a") if a["href"][0] == "#")
    regions = Counter(a.get("aria-label") for _, a in page.elements if a.get("role") == "region")
    assert max(regions.values()) == 1, "two places that a screen reader cannot tell apart"


def test_a_dial_task_without_figures_says_which_are_missing(build, dials, figures):
    for place in ("madtd/R1", "beyond/Y1"):
        (figures / "smoke" / f"{place}.svg").unlink()
    text = build(experiments=[dials[1], dials[2]], verdicts=[])
    section = Page(text[text.index('<section id="dials"') : text.index("<article")])
    assert "No figure at the smoke tier yet. Real-benchmark diagnostic. R1: " in section.text
    assert "No figure at the smoke tier. Real-benchmark diagnostic. C Not in this report." in section.text
    assert Page(text).text.count(dials[2].spec.caption) == 1


def test_without_dial_tasks_there_is_no_section_of_them(build):
    assert "dials" not in build().split("</style>")[1]


def test_dials_that_all_arms_share_are_listed_one_by_one(build, new_home, results):
    """An arm that sets one dial must not hide the others."""
    variants = {
        f"m{k}": {**synthetic.TRIAL["variants"]["mbpo"], "label": f"m{k}", "environment": {"dials": {"nuisance": k}}}
        for k in (3, 4)
    }
    runs = json.loads(json.dumps(synthetic.TRIAL["runs"]))
    runs["small"]["settings"]["environment"] = {"dials": {"process_noise": 0.25}}
    runs["small"]["budget"] = {"smoke": runs["small"]["budget"]["smoke"]}
    runs["small"]["budget"]["smoke"][0]["tasks"] = ["dial-reach"]
    figure = {"panels": [{"kind": "final", "metrics": {"return/final": "r"}, "label": "r"}]}
    experiment = synthetic.trial(new_home, variants=variants, runs=runs, figure=figure, claims=[])
    text = Page(build(experiments=[experiment], verdicts=[])).text
    assert "dials.process_noise 0.25 0 the experiment" in text
    assert "m3 dials nuisance 3" in text
    assert "dials.nuisance" not in text, "what arms set is listed with them"


def test_arms_of_several_agents_share_the_rows_of_a_group(build, new_home, results):
    experiment = synthetic.trial(new_home, claims=[])
    text = Page(build(experiments=[experiment], verdicts=[])).text
    assert "Settings of mbpo, sac under online" in text
    assert text.count("width 16 256 this tier") == 1
    assert "SAC agent sac, updates_per_step 1" in text


def test_a_table_of_hyperparameters_needs_no_runs(build, new_home, results, figures):
    experiment = synthetic.table(new_home, synthetic.DEFAULTS)
    path = figures / "smoke/beyond/Y1.svg"
    inputs = {"experiments": [experiment], "verdicts": []}
    text = Page(build(**inputs)).text
    assert "No figure yet. This draws it: dynarep figure --experiment Y1 --tier smoke" in text
    assert "Not run at this tier" not in text
    assert "No runs at this tier yet" not in text
    path.parent.mkdir()
    path.write_text(SVG)
    page = Page(build(**inputs))
    assert len(page.all("img")) == 1
    assert page.all("img")[0]["alt"].startswith("Table Y1: Does a trial")
    assert "dynarep figure --experiment Y1 --tier smoke" in page.text


def test_a_table_of_returns_is_shown_like_a_figure(build, new_home, figures):
    experiment = synthetic.table(new_home, synthetic.RETURNS)
    (figures / "smoke/beyond").mkdir()
    (figures / "smoke/beyond/Y1.svg").write_text(SVG)
    page = Page(build(experiments=[experiment], verdicts=[]))
    assert "A cell per task and arm: final return" in page.all("img")[0]["alt"]
    assert "No runs at this tier yet" in page.text


# -- an archive ---------------------------------------------------------------------------------------------------


def test_same_inputs_same_bytes_wherever_the_results_lie(build, results, figures, tmp_path):
    page = build()
    assert build() == page
    moved = shutil.copytree(results, tmp_path / "elsewhere" / "runs")
    assert build(results=moved, figures=shutil.copytree(figures, tmp_path / "elsewhere" / "figures")) == page
    assert str(tmp_path) not in page


def test_a_mixture_of_machines_or_versions_is_seen(build, results):
    assert "All runs agree on everything below" in Page(build()).text
    edit_manifest(results, lambda m: m["versions"].update(torch="9.9"))
    edit_manifest(results, lambda m: m["machine"].pop("kernels"))
    text = Page(build()).text
    assert "differ in: machine: kernels, torch" in text
    assert "9.9 (2 runs)" in text
    assert "not recorded (2 runs)" in text


def test_a_run_that_two_experiments_share_is_counted_once(build, experiments):
    r1 = find(experiments, "madtd_R1")
    again = Experiment(r1.file, r1.spec.model_copy(update={"id": "R9", "claims": ()}))
    assert "4 runs, " in Page(build(experiments=[*experiments, again])).text


def test_energy_is_what_the_core_hours_say_under_the_stated_assumption(build, results):
    def hours(manifest):
        manifest["cost"].update(cpu_s=3600.0 * 5, seeds_in_job=1, peak_mib=1234)

    edit_manifest(results, hours, "seed=*")
    text = Page(build()).text
    assert "4 runs, 20 CPU core-hours in all" in text
    assert "the largest job took 1 234 MiB of memory" in text
    assert "about 0.2 kWh, estimated, not measured: the core-hours times 10 W, which we assume" in text
    assert "4 of 4 runs are there, which took 20 CPU core-hours" in text
    assert "accelerators" not in text
    edit_manifest(results, lambda m: m["machine"].update(device="cuda"))
    assert "The accelerators of 2 runs are not counted." in Page(build()).text


@pytest.mark.parametrize(
    ("core_hours", "written"),
    [(2.0, "2 CPU core-hours"), (0.5, "30 CPU minutes"), (0.01, "36 CPU seconds"), (0.0, "0 CPU seconds")],
)
def test_cpu_time_is_written_in_a_unit_that_fits(core_hours, written):
    assert cpu_time(core_hours) == written


def test_cpu_time_is_shared_among_the_seeds_of_a_job_and_includes_stops():
    manifest = {"cost": {"cpu_s": 10.0, "seeds_in_job": 5}, "resumed": [{"stopped_at": 3, "cpu_s": 5.0}]}
    assert made.cpu_seconds(manifest) == 3.0
    assert made.cpu_seconds({}) == 0.0


# -- what is missing ----------------------------------------------------------------------------------------------


def test_a_missing_figure_names_the_command_that_draws_it(build, figures):
    (figures / "smoke/madtd/R1.svg").unlink()
    page = Page(build())
    assert "No figure yet. This draws it: dynarep figure --experiment R1 --tier smoke" in page.text
    assert len(page.all("img")) == 1


def test_an_experiment_without_runs_keeps_its_section(build, tmp_path):
    text = Page(build()).text
    assert "No runs at this tier yet. This makes them: snakemake --cores 2 ftfl_C" in text
    nothing = Page(build(results=tmp_path / "empty", figures=tmp_path / "none")).text
    assert nothing.count("No runs at this tier yet") == 2
    assert "No runs were found" in nothing


def test_an_experiment_that_a_tier_leaves_out_says_so(build, experiments):
    spec = experiments[0].spec
    runs = {
        name: group.model_copy(update={"budget": {t: b for t, b in group.budget.items() if t == "paper"}})
        for name, group in spec.runs.items()
    }
    out = Experiment(experiments[0].file, spec.model_copy(update={"runs": runs}))
    text = Page(build(experiments=[out, *experiments[1:]])).text
    assert "no runs planned at: smoke, ci, reduced" in text
    assert "Not run at this tier" in text


def test_missing_and_altered_seeds_are_named(build, results):
    folders = sorted(results.glob("mad_td/*/*/seed=1"))
    shutil.rmtree(folders[0])
    with (folders[1] / records.METRICS).open("a") as file:
        file.write("0,0,0,diverged,1\n")
    text = Page(build()).text
    assert text.count("1 of 2 missing seed 1") == 2
    assert re.search(r"not believed mad_td/\S+/seed=1/metrics.csv: was altered", text)


def test_diverged_runs_are_named(build, results):
    for folder in results.glob("mad_td/*/*/seed=1"):
        manifest = json.loads((folder / records.MANIFEST).read_text())
        records.write(folder, METRICS.replace("16,diverged,0", "16,diverged,1"), manifest)
    assert Page(build()).text.count("2 of 2 diverged seed 1") == 2


@pytest.mark.parametrize("tier", ["smoke", "paper"])
def test_the_commands_explain_the_claims_that_the_tier_can_judge(build, experiments, tier):
    lines = re.findall(r"dynarep claims --explain (\S+) --tier (\w+)", build(tier=tier))
    able = [c.id for e in experiments for c in e.spec.claims if c.role(tier) != "untested"]
    assert lines == [(claim, tier) for claim in able]
    assert bool(able) == (tier == "paper")


@pytest.mark.parametrize("tier", ["smoke", "paper"])
def test_the_commands_train_the_runs_they_stand_for(build, experiments, monkeypatch, tier):
    asked = []
    monkeypatch.setattr(run, "train", lambda job, *_: asked.append(job.key()) or [])
    monkeypatch.setattr("dynarep.cli.train.load_all", lambda: experiments)  # those of the page: each call reads all
    lines = [line for line in build(tier=tier).splitlines() if "dynarep train --" in line]
    planned = [job.key() for e in experiments for job in e.jobs(tier)]
    assert len(lines) == len(planned)
    for line in lines[:3] + lines[-3:]:
        cli.main(shlex.split(re.sub(r"<[^>]*>", "", line))[1:])
    assert asked == planned[:3] + planned[-3:]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (0.0, "0"),
        (-0.5, "−0.5"),
        (3.14159, "3.14"),
        (123456.7, "123\u202f457"),
        (-1234, "−1\u202f234"),
        (2.5e9, "2.5e+09"),
        (1e-5, "1e−05"),
    ],
)
def test_numbers_are_written_for_people(value, written):
    assert report.number(value) == written
