"""Every chapter runs at the paper's own scale: the real models, on two batches of stand-in data."""

from __future__ import annotations

import pytest

from leantrain import runner
from leantrain.catalog import load_catalog
from leantrain.records import read_record


@pytest.mark.slow
@pytest.mark.parametrize("paper", load_catalog().built(), ids=lambda paper: paper.slug)
def test_the_paper_profile_runs_dry_and_decides_nothing(paper, tmp_path):
    job = runner.plan(paper, "paper", {"dry_run": True}, target=tmp_path / f"{paper.slug}.ipynb")
    (outcome,) = runner.run_jobs([job], force=True)
    assert (outcome.status, outcome.cause) == ("done", "")
    record = read_record(job.target)
    assert record.parameters["dry_run"] is True
    assert record.measurements == {}, "numbers from stand-in data are no result"
