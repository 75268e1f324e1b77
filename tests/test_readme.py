"""What the README says is what the committed runs give."""

import re

import pytest

from conftest import CHECKOUT
from dynarep import cli
from dynarep.experiment import load_all

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")


def test_the_verdict_table_is_the_one_that_the_committed_runs_give(capsys):
    """Neither an edited table nor other runs go unnoticed."""
    cli.main(["claims", "--tier", "ci", "--from", "reference", "--markdown"])
    printed = capsys.readouterr().out.strip()
    assert "| C1 |" in printed
    assert printed in README, "type `dynarep claims --tier ci --from reference --markdown` and put it there"


@pytest.mark.parametrize("experiment", load_all(), ids=lambda experiment: experiment.key)
def test_the_map_names_every_experiment_its_figure_and_its_claims(experiment):
    file = experiment.file.relative_to(CHECKOUT)
    rows = [line for line in README.splitlines() if line.startswith("|") and f"({file})" in line]
    assert len(rows) == 1, file
    assert f"`{experiment.spec.paper}/{experiment.spec.id}`" in rows[0]
    named = set(re.findall(r"\b[A-Z]\d+[a-z]?\b", rows[0].split("|")[4]))
    assert named == {claim.id for claim in experiment.spec.claims}
