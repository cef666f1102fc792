"""Records: what counts as a complete run, and what makes one stale."""

from __future__ import annotations

import json

import pytest

from leantrain import paths, records
from leantrain.catalog import load_catalog
from leantrain.data.registry import DATASETS
from leantrain.records import MIME, IncompleteRun, freshness, read_record


def edit(path, change):
    notebook = json.loads(path.read_text())
    change(notebook)
    path.write_text(json.dumps(notebook))


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def record_of(notebook):
    return code(notebook)[-2]["outputs"][0]["data"][MIME]


def test_a_complete_run_is_read_and_fresh(executed):
    record = read_record(executed.chapter)
    assert record.measurements["toy.large"]["main"].low == 1.8
    assert freshness(record, load_catalog().paper("toy")).state == "fresh"


def _error(notebook):
    output = {"output_type": "error", "ename": "ZeroDivisionError", "evalue": "division by zero", "traceback": []}
    code(notebook)[1]["outputs"] = [output]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_error, "code cell 2 .* raised ZeroDivisionError"),
        (lambda n: code(n)[2].update(execution_count=None), "code cell 3 .* did not run"),
        (lambda n: code(n)[2].update(execution_count=7), "ran out of order"),
        (lambda n: n["metadata"].pop("leantrain"), "no completion stamp"),
        (lambda n: n["metadata"]["leantrain"].update(complete=False, cause="the kernel died"), "the kernel died"),
        (lambda n: code(n)[-2].update(outputs=[]), "holds 0 records"),
        (lambda n: code(n)[-2]["outputs"].append(code(n)[-2]["outputs"][0]), "holds 2 records"),
        (lambda n: record_of(n)["measurements"]["toy.answer"]["main"].update(value=41.0, low=41.0), "changed after"),
        (lambda n: n.pop("metadata"), "no readable notebook"),
    ],
)
def test_an_incomplete_run_is_refused_with_its_cause(executed, change, says):
    edit(executed.chapter, change)
    with pytest.raises(IncompleteRun, match=says):
        read_record(executed.chapter)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"cells": 3}', "\x00"])
def test_a_torn_file_is_refused(executed, content):
    executed.chapter.write_text(content)
    with pytest.raises(IncompleteRun, match="no readable notebook"):
        read_record(executed.chapter)
    executed.chapter.unlink()
    with pytest.raises(IncompleteRun, match="is missing"):
        read_record(executed.chapter)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["measurements"]["toy.answer"]["main"].update(value=float("nan")),
        lambda r: r["measurements"]["toy.answer"]["main"].update(n=0),
        lambda r: r["measurements"]["toy.answer"]["main"].pop("low"),
        lambda r: r["provenance"].pop("processor"),
        lambda r: r.update(version=2),
        lambda r: r.update(profile="huge"),
        lambda r: r.update(extra=1),
    ],
)
def test_a_faulty_record_does_not_finish(executed, change):
    notebook = json.loads(executed.chapter.read_text())
    change(record_of(notebook))
    with pytest.raises(IncompleteRun, match="the record is faulty"):
        records.finish(notebook)


def test_changing_a_measured_value_changes_the_verdict(executed):
    paper = load_catalog().paper("toy")
    for value, verdict in ((42.0, "reproduced"), (45.0, "partly"), (60.0, "not reproduced")):
        notebook = json.loads(executed.chapter.read_text())
        record_of(notebook)["measurements"]["toy.answer"]["main"].update(value=value, low=value, high=value)
        record = records.finish(notebook)
        assert str(paper.claim("toy.answer").decide(record.measurements["toy.answer"])) == verdict


def test_each_thing_a_run_depends_on_makes_it_stale_by_name(executed):
    record = read_record(executed.chapter)
    paper = load_catalog().paper("toy")
    library = executed.root / "lib/leantrain/experiment.py"

    library.write_text('"""A docstring."""\n\nimport torch\n\nLIMIT = 1  # a comment\n')
    assert freshness(record, paper).changes == []
    library.write_text("import torch\n\nLIMIT = 2\n")
    assert freshness(record, paper).changes == ["module leantrain.experiment"]
    library.write_text("import torch\n\nLIMIT = 1\n")

    executed.write_notebook("x = 1")
    assert freshness(record, paper).changes == ["the notebook's code"]
    executed.write_notebook("# only a comment")
    assert "the notebook's code" in freshness(record, paper).changes  # one more cell, even if empty of code
    executed.write_notebook()

    lock = paths.LOCK.read_text()
    paths.LOCK.write_text(lock.replace("sympy==1.14", "sympy==1.15").replace("sphinx==7", "sphinx==8"))
    assert freshness(record, paper).changes == ["package sympy (1.14 then, 1.15 now)"]
    paths.LOCK.write_text(lock.replace(" # via torch", ""))
    assert freshness(record, paper).changes == ["package sympy (1.14 then, not reached now)"]
    paths.LOCK.write_text(lock)

    (paths.PROFILES / "book/toy.yml").write_text("profile: book\nseeds: [0, 1, 2, 3]\n")
    assert freshness(record, paper).changes == ["parameter seeds ([0, 1, 2] then, [0, 1, 2, 3] now)"]
    (paths.PROFILES / "book/toy.yml").write_text("profile: book\nseeds: [0, 1, 2]\n")

    paths.CATALOG.write_text(paths.CATALOG.read_text().replace("at_least: 41", "at_least: 40"))
    assert freshness(record, load_catalog().paper("toy")).changes == ["the rule of claim toy.answer"]


def test_reached_modules_follow_imports_through_packages(house):
    files = {
        "training/__init__.py": (
            "from leantrain.training.vit import small_vit\nfrom leantrain.training.text import model\n"
        ),
        "training/vit.py": "from leantrain.measure import cost\n",
        "training/text.py": "",
        "measure/__init__.py": "",
        "measure/cost.py": "",
        "measure/timing.py": "",
        "techniques/__init__.py": "",
        "techniques/toy.py": "def f():\n    from ..training import small_vit\n",
        "chapter.py": "from leantrain.measure import timing\n",
    }
    for name, text in files.items():
        path = house.root / "lib/leantrain" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (house.root / "lib/leantrain/__init__.py").write_text("")
    reached = records.reached_modules(["from leantrain.chapter import Chapter\nfrom leantrain.techniques import toy\n"])
    assert sorted(reached) == [
        "leantrain.experiment",
        "leantrain.measure.cost",
        "leantrain.techniques.toy",
        "leantrain.training.vit",
    ]


def test_messages_name_no_folder_of_this_machine(house):
    message = f"cannot open {house.root}/_build/x and {paths.Path.home()}/y"
    assert records.strip_paths(message) == "cannot open _build/x and ~/y"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "file"
    paths.write_atomically(target, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paths.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        paths.write_atomically(target, "new")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_packages_are_followed_through_the_lock(house):
    paths.LOCK.write_text(
        "numpy==2.4.6 # via pandas, scikit-learn\n"
        "pandas==3.1.0 # via leantrain (pyproject.toml)\n"
        "scikit-learn==1.9.0 # via leantrain (pyproject.toml)\n"
        "seaborn==0.13.2\n"
        "triton==3.8.0 ; sys_platform == 'linux' # via torch\n"
    )
    through = records.reached_packages(["import os\nfrom sklearn.svm import SVC"])
    assert through == {"numpy": "2.4.6", "scikit-learn": "1.9.0"}
    assert records.reached_packages(["import leantrain\nfrom . import paths"]) == {}
    assert set(records.reached_packages(["import pandas.testing", "import not_in_the_lock"])) == {
        "numpy",
        "pandas",
        "scikit-learn",
        "seaborn",
        "triton",
    }


def test_data_that_changed_in_the_registry_makes_a_record_stale(executed):
    record = read_record(executed.chapter)
    digits = DATASETS["digits"].checksums
    array = next(iter(digits))
    for found, changes in ((digits, []), ({array: "0" * 64}, [f"data {array}"]), ({"laid by hand": "1" * 64}, [])):
        provenance = record.provenance.model_copy(update={"data": found})
        other = record.model_copy(update={"provenance": provenance})
        assert freshness(other, load_catalog().paper("toy")).changes == changes
