"""The seven steps of CONTRIBUTING.md, walked in a copy of the project with its own commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from leantrain import paths

PAGE = paths.ROOT / "CONTRIBUTING.md"

#: Commands that the walk leaves out, and why.
NOT_WALKED = {
    "make test": "runs these tests",
    "make portable": "runs all notebooks; a test of reliability does so for two of them",
    "make lock": "asks a package index, and needs uv",
    "leantrain book": "the tests of the book render it",
    "leantrain run": "a mention; the walk gives it its arguments",
    "leantrain show": "a mention; the walk gives it its argument",
}

SLUG = "counting-to-three"

ROW = f"""
  - slug: {SLUG}
    title: Counting to three
    short: Counting
    authors: [A. Author]
    year: 2024
    venue: arXiv preprint
    part: better-steps
    kind: technique
    problem: Nobody has counted to three.
    idea: Count to three.
    tests: We count.
    claims:
      - id: {SLUG}.count
        headline: true
        sentence: One counts to three.
        metric: count
        unit: steps
        paper: 3
        conditions: none
        stated: abstract
        tested: exact
        how: It is counted.
        min_n: 1
        rule:
          reproduced: [{{at_least: 3, at_most: 3}}]
"""

#: What a chapter has in place of the template's draft once its sections are filled.
VERDICTS = f"""\
from leantrain.measure.statistics import Estimate

chapter.measure("{SLUG}.count", Estimate.exact(3))
chapter.verdicts()"""


def commands():
    """Every command that stands in the text, once, in its order."""
    found = re.findall(r"`((?:leantrain|make|\.venv/bin/\S+) [^`]+)`", PAGE.read_text(encoding="utf-8"))
    return list(dict.fromkeys(found))


def test_every_reason_to_leave_a_command_out_belongs_to_one():
    assert set(NOT_WALKED) <= set(commands())


@pytest.fixture
def project(tmp_path):
    """What a contributor starts from, without the chapters of others."""
    for name in ("lib", "book"):
        ignored = shutil.ignore_patterns("chapters", "__pycache__", "*.egg-info")
        shutil.copytree(paths.ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("requirements.lock", "pyproject.toml", ".pre-commit-config.yaml"):
        shutil.copy(paths.ROOT / name, tmp_path)
    (tmp_path / "notebooks").mkdir()
    return tmp_path


@pytest.mark.slow
def test_the_seven_steps(project):
    environment = {**os.environ, "LEANTRAIN_ROOT": str(project), "PYTHONPATH": str(project / "lib")}
    walked = set()

    def call(*words, expected=0):
        done = subprocess.run(
            words, cwd=project, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == expected, done.stdout + done.stderr
        return done.stdout + done.stderr

    def step(command, expected=0):
        assert command in commands()
        walked.add(command)
        program, *words = shlex.split(command.replace("SLUG", SLUG))
        module = {"leantrain": "leantrain.cli", ".venv/bin/pre-commit": "pre_commit"}[program]
        return call(sys.executable, "-m", module, *words, expected=expected)

    call("git", "init", "--quiet")
    step(".venv/bin/pre-commit install")
    assert (project / ".git" / "hooks" / "pre-commit").is_file()

    catalog = project / "book" / "papers.yml"
    papers, mark, studies = catalog.read_text(encoding="utf-8").partition("\n# -" + 63 * "-" + " Studies of")
    sound = papers + ROW + mark + studies
    catalog.write_text(sound.replace("One counts to three.", ""), encoding="utf-8")
    assert f"{SLUG}" in step("leantrain list", expected=1)
    catalog.write_text(sound, encoding="utf-8")
    assert re.search(rf"{SLUG} .*planned", step("leantrain list"))

    written = step("leantrain new SLUG").split()
    test = "tests/techniques/test_counting_to_three.py"
    assert test in written
    assert all((project / name).is_file() for name in written)
    call(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test)

    notebook = project / "notebooks" / f"{SLUG}.ipynb"
    draft = json.loads(notebook.read_text(encoding="utf-8"))
    (cell,) = (cell for cell in draft["cells"] if "draft=True" in "".join(cell["source"]))
    cell["source"] = VERDICTS
    notebook.write_text(json.dumps(draft), encoding="utf-8")
    assert "reproduced" in step("leantrain run SLUG --store")
    assert "lt-badge--reproduced" in notebook.read_text(encoding="utf-8")

    call("git", "add", "--all")
    author = ("-c", "user.name=A. Author", "-c", "user.email=author@example.org")
    call("git", *author, "commit", "--quiet", "--no-verify", "--message", "A new paper")
    assert "reproduced" in step("leantrain run SLUG --profile book")
    chapter = json.loads((project / "book" / "chapters" / f"{SLUG}.ipynb").read_text(encoding="utf-8"))
    head = call("git", "rev-parse", "HEAD").strip()
    assert head in json.dumps(chapter)
    step("leantrain run SLUG --profile paper --dry-run")
    assert "One counts to three." in step("leantrain show SLUG")
    assert walked | set(NOT_WALKED) == set(commands())
