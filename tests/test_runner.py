from __future__ import annotations

import json

from leantrain import records, runner
from leantrain.catalog import load_catalog


def test_complete_run_lands_with_its_record(house):
    toy = load_catalog().paper("toy")
    (outcome,) = runner.run_jobs([runner.plan(toy, "book")])
    assert (outcome.status, outcome.cause) == ("done", "")
    record = records.read_record(house.root / "book/chapters/toy.ipynb")
    assert record.parameters == {"profile": "book", "seeds": [0, 1, 2], "answer": 42.0, "dry_run": False}
    assert str(toy.claims[0].decide(record.measurements["toy.answer"])) == "reproduced"
    print(json.dumps(record.model_dump(), indent=1)[:3000])
