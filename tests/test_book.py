"""The book's table of contents, scoreboard, checks on chapters, and build."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from leantrain import book, paths
from leantrain.book import (
    BookError,
    chapter_faults,
    primary_quantity,
    scoreboard_rows,
    scrub,
    tally,
    write_scoreboard,
)
from leantrain.catalog import Catalog, Claim, Quantity, Verdict, load_catalog
from leantrain.records import read_record


def edit(path, change):
    notebook = json.loads(path.read_text())
    change(notebook)
    path.write_text(json.dumps(notebook))


# ---------------------------------------------------------------- table of contents


def test_the_table_of_contents_of_a_tiny_catalogue(house):
    assert book.table_of_contents(load_catalog()) == {
        "format": "jb-book",
        "root": "book/index",
        "parts": [
            {
                "caption": "Start here",
                "chapters": [{"file": "book/how-to-read"}, {"file": "book/scoreboard"}, {"file": "book/costs"}],
            },
            # The paper `other` has no notebook: it is planned and has no entry.
            {"caption": "First part", "chapters": [{"file": "book/parts/first"}, {"file": "book/chapters/toy"}]},
            {
                "caption": "Reference",
                "chapters": [{"file": f"book/{name}"} for name in ("scaling", "glossary", "bibliography")],
            },
        ],
    }


def test_the_table_of_contents_is_written_only_when_it_changed(house):
    path = book.write_toc(load_catalog())
    assert yaml.safe_load(path.read_text()) == book.table_of_contents(load_catalog())
    before = path.stat().st_ino
    book.write_toc(load_catalog())
    assert path.stat().st_ino == before
    shutil.copy(house.root / "notebooks" / "toy.ipynb", house.root / "notebooks" / "other.ipynb")
    book.write_toc(load_catalog())
    assert path.stat().st_ino != before
    assert "book/chapters/other" in path.read_text()


# ---------------------------------------------------------------- scoreboard


def rows(published=None, local=None, changes=lambda record, paper: []):
    return {r.claim.id: r for r in scoreboard_rows(load_catalog(), published or {}, local or {}, changes)}


def test_a_published_run_beside_a_local_one(executed):
    published = {"toy": read_record(executed.chapter)}
    smaller = published["toy"].model_copy(
        update={
            "profile": "quick",
            "measurements": {"toy.answer": {"main": Quantity(value=35, low=34, high=36, n=1)}},
        }
    )
    found = rows(published, {"toy": smaller})
    answer = found["toy.answer"]
    assert str(answer.decision) == "reproduced"
    assert answer.published.quantity.value == 42.0
    assert str(answer.local.decision) == "partly"
    assert answer.local.quantity.value == 35
    large = found["toy.large"]
    assert str(large.decision) == "reproduced"
    assert (large.local.quantity, large.local.reason) == (None, "Needs real data.")
    assert large.local.decision.verdict == Verdict.OUT_OF_REACH
    assert answer.verified
    assert not large.verified
    planned = found["other.claim"]
    assert (planned.decision.verdict, planned.published, planned.local) == (Verdict.PLANNED, None, None)
    assert tally(found.values()) == {
        Verdict.REPRODUCED: 2,
        Verdict.PARTLY: 0,
        Verdict.NOT_REPRODUCED: 0,
        Verdict.OUT_OF_REACH: 0,
        Verdict.PLANNED: 1,
    }


def test_the_scoreboard_as_data_says_what_the_page_says(executed, tmp_path):
    record = read_record(executed.chapter)
    found = rows({"toy": record}, {"toy": record.model_copy(update={"profile": "quick"})})
    written = write_scoreboard(found.values(), tmp_path)
    assert [path.name for path in written] == ["scoreboard.csv", "scoreboard.json"]
    table = json.loads(written[1].read_text())
    answer, planned = (next(line for line in table if line["claim"] == name) for name in ("toy.answer", "other.claim"))
    assert (answer["value"], answer["verdict"], answer["indicative"]) == (42.0, "reproduced", False)
    assert (answer["local_value"], answer["local_profile"], answer["local_verdict"]) == (42.0, "quick", "reproduced")
    assert (answer["profile"], answer["freshness"], answer["processor"]) == (
        record.profile,
        "fresh",
        record.provenance.processor,
    )
    assert (planned["verdict"], planned["value"], planned["profile"], planned["local_verdict"]) == ("planned",) + (
        None,
    ) * 3
    with written[0].open(newline="") as file:
        lines = list(csv.DictReader(file))
    # A spreadsheet knows text only: an empty field is a value that does not exist.
    as_text = [{k: "" if v is None else str(v) for k, v in line.items()} for line in table]
    assert lines == as_text
    assert [p.read_text() for p in write_scoreboard([], tmp_path)] == ["\n", "[]\n"]


def test_too_few_runs_make_a_verdict_indicative(executed):
    record = read_record(executed.chapter)
    few = {"toy.large": {"main": Quantity(value=2.0, low=1.8, high=2.2, n=2)}}
    found = rows({"toy": record.model_copy(update={"measurements": few})})
    assert str(found["toy.large"].decision) == "reproduced (indicative)"


def test_a_stale_record_keeps_its_verdict_and_says_what_changed(executed):
    record = read_record(executed.chapter)
    (executed.root / "requirements.lock").write_text("torch==2.15.0\n")
    found = {r.claim.id: r for r in scoreboard_rows(load_catalog(), {"toy": record}, {})}
    assert found["toy.answer"].published.changes == (
        "package sympy (1.14 then, not reached now)",
        "package torch (2.14.1 then, 2.15.0 now)",
    )
    assert str(found["toy.answer"].decision) == "reproduced"


def test_faulty_parameters_of_today_make_a_record_stale(executed):
    (executed.root / "notebooks/profiles/book/toy.yml").write_text("nonsense: 1\n")
    found = {r.claim.id: r for r in scoreboard_rows(load_catalog(), {"toy": read_record(executed.chapter)}, {})}
    (change,) = found["toy.answer"].published.changes
    assert change.startswith("the parameters, which are faulty now: ")
    assert "nonsense" in change


def test_a_claim_that_the_run_did_not_know_has_no_verdict(executed):
    record = read_record(executed.chapter)
    text = paths.CATALOG.read_text()
    paths.CATALOG.write_text(text.replace("{at_least: 41, at_most: 43}", "{of: second, at_least: 41}"))
    answer = rows({"toy": record})["toy.answer"].published
    assert (answer.decision.verdict, answer.quantity) == (Verdict.OUT_OF_REACH, None)
    assert "rule of the claim changed" in answer.reason
    paths.CATALOG.write_text(text.replace("toy.large", "toy.newer"))
    newer = rows({"toy": record})["toy.newer"].published
    assert newer.decision.verdict == Verdict.OUT_OF_REACH
    assert "after this run" in newer.reason


def claim(**changes) -> Claim:
    plain = load_catalog().paper("toy").claims[0].model_dump()
    return Claim.model_validate({**plain, **changes})


@pytest.mark.parametrize(
    ("paper", "unit", "text"),
    [
        (4.0, "%", "4 %"),
        (0.3, "points", "0.3 points"),
        (1.95, "x", "1.95 x"),
        (2.0, "", "2"),
        ("faster, no number", "points", "faster, no number"),
        (None, "%", "–"),
    ],
)
def test_the_papers_value_as_text(house, paper, unit, text):
    assert claim(paper=paper, unit=unit).paper_text == text


def test_the_quantity_beside_the_papers_value_is_the_first_that_the_rule_names(house):
    rule = {"reproduced": [{"of": "half", "at_least": 0}, {"of": "same", "at_least": 0}]}
    assert primary_quantity(claim(rule=rule)) == "half"
    assert primary_quantity(claim()) == "main"


# ---------------------------------------------------------------- scrubbing


def cell(*outputs, source="1 + 1", count=1, metadata=None):
    return {
        "cell_type": "code",
        "source": source,
        "execution_count": count,
        "outputs": list(outputs),
        "metadata": metadata or {},
    }


def shows(mime, content):
    return {"output_type": "display_data", "data": {mime: content}, "metadata": {}}


def prints(text):
    return {"output_type": "stream", "name": "stdout", "text": text}


def faults_of(*cells, private=(), metadata=None):
    return scrub({"cells": list(cells), "metadata": metadata or {}}, private)


CLEAN_HTML = (
    "<div class='lt-card'><a href='https://arxiv.org/abs/2311.03426'>arXiv</a> 3 s/step, 50 % of tokens/s, and/or "
    "<img alt='a' src='data:image/png;base64,AAAA'> <small>n = 5</small> [1.0, 2.0]</div>"
)


def test_a_clean_notebook_passes():
    assert not faults_of(
        {"cell_type": "markdown", "source": "See [a page](https://example.org/a/b).", "metadata": {}},
        cell(shows("text/html", CLEAN_HTML), prints("loss 0.5\nnotebooks/gqkva.ipynb\n50 %\r\n")),
        cell(source="", count=None),
        cell(
            shows("image/png", "iVBOR/home/w0KG/gg/=="),
            shows("text/plain", "tensor([1., 2.])\nhttps://a.org/b/c"),
            count=2,
        ),
        cell(shows("application/vnd.leantrain.record+json", {"slug": "toy", "system": "Linux x86_64"}), count=3),
        metadata={"kernelspec": {"name": "python3"}},
    )


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (shows("text/html", "<p>a</p><SCRIPT>alert(1)</SCRIPT>"), "a script"),
        (shows("text/html", "<img src='x.png' onerror='alert(1)'>"), "script in the attribute onerror"),
        (shows("text/html", "<a href=' javascript:alert(1)'>a</a>"), "script in the attribute href"),
        (shows("application/javascript", "alert(1)"), "a script"),
        (shows("image/svg+xml", "<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>"), "a script"),
        (shows("text/html", "<iframe src='https://example.org'></iframe>"), "frame"),
        (shows("text/html", "<object data='a.swf'></object>"), "frame or object"),
        (shows("text/html", "<link rel=stylesheet href='https://example.org/a.css'>"), "style sheet"),
        (shows("text/html", "<img src='https://example.org/a.png'>"), "remote resource"),
        (shows("text/html", "<img src='//example.org/a.png'>"), "remote resource"),
        (shows("text/html", "<p style='background: url(https://example.org/a.png)'>a</p>"), "remote resource"),
        (shows("image/svg+xml", "<svg><image xlink:href='http://example.org/a.png'/></svg>"), "remote resource"),
        (shows("text/markdown", "![a](https://example.org/a.png)"), "remote image"),
        (shows("text/html", "<progress max=3 value=1></progress>"), "progress bar"),
        (shows("application/vnd.jupyter.widget-view+json", {"model_id": "1"}), "a widget"),
        (shows("text/html", "<img src='/srv/books/a.png'>"), "absolute path"),
        (shows("text/html", "<td>/srv/books/a.png</td>"), "absolute path"),
        (prints("saved to /srv/books/run 3/a.ckpt"), "absolute path"),
        (prints("File '/opt/python3.11/site-packages/torch/nn.py', line 3: UserWarning"), "absolute path"),
        (shows("text/plain", "PosixPath('/srv/books')"), "absolute path"),
        (shows("application/vnd.leantrain.record+json", {"data": {"/srv/books/a.bin": "00"}}), "absolute path"),
        (prints("see ~/books/a"), "path of one machine"),
        (prints("see file:///a"), "path of one machine"),
        (prints(r"C:\Users\a"), "path of one machine"),
        (prints("run by k.miller-7 today"), "name of the machine"),
        (prints("adam@example:~$"), "name of the machine"),
        (prints("token hf_" + "a" * 30), "access token"),
        (prints("Traceback (most recent call last):\n  ..."), "traceback"),
        (prints("1/10\r2/10\r"), "progress-bar debris"),
        (prints("\x1b[32mok\x1b[0m"), "progress-bar debris"),
        (prints(" 40%|████      | 4/10 [00:01<00:02,  3.2it/s]"), "progress bar's text"),
        (shows("text/plain", "<function f at 0x7f3a5c0d1e40>"), "memory address"),
        (prints("x" * 100_001), "readable page"),
        ({"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}, "error output (ValueError)"),
    ],
)
def test_the_scrubber_names_the_cell_and_what_it_shows(output, says):
    faults = faults_of(cell(), cell(output, count=2), private=["k.miller-7", "adam"])
    assert faults
    assert all("code cell 2" in fault for fault in faults)
    assert says in " ".join(faults)


def test_a_private_name_that_is_a_word_may_stand_in_a_text():
    assert not faults_of(cell(prints("adam with a small step; the optimiser adam.")), private=["adam"])


def test_text_split_into_lines_is_searched_as_one():
    assert faults_of(cell(shows("text/html", ["<scr", "ipt>alert(1)</script>"])))


@pytest.mark.parametrize(
    ("counts", "says"), [((1, None), "code cell 2 did not run"), ((2, 1), "out of order"), ((1, 3), "as number 3")]
)
def test_cells_that_did_not_run_in_order(counts, says):
    faults = faults_of(*(cell(count=count) for count in counts))
    assert says in " ".join(faults)


def test_metadata_are_searched():
    papermill = {"papermill": {"output_path": "/srv/books/out.ipynb"}}
    assert any("notebook's metadata" in fault for fault in faults_of(cell(), metadata=papermill))
    assert any("metadata of code cell 1" in fault for fault in faults_of(cell(metadata={"path": "/srv/books/out"})))


# ---------------------------------------------------------------- published chapters


def test_a_complete_clean_chapter_has_no_faults(executed):
    assert chapter_faults(load_catalog()) == []


def test_a_stale_chapter_is_no_fault(executed):
    (executed.root / "requirements.lock").write_text("torch==2.15.0\n")
    assert chapter_faults(load_catalog()) == []


def restamp(change):
    """A change to the record, made before the run was stamped complete."""
    from leantrain.records import MIME, finish

    def apply(notebook):
        code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
        change(code[-2]["outputs"][0]["data"][MIME])
        finish(notebook)

    return apply


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda n: n["metadata"].pop("leantrain"), "no completion stamp"),
        (lambda n: n["cells"][2].update(execution_count=None), "did not run"),
        (lambda n: n["cells"][2]["outputs"].append(prints("/srv/books/a")), "code cell 2 shows an absolute path"),
        (restamp(lambda r: r.update(profile="quick")), "was run at the profile 'quick'"),
        (restamp(lambda r: r["parameters"].update(dry_run=True)), "is a dry run"),
        (restamp(lambda r: r.update(slug="other")), "holds the record of other"),
    ],
)
def test_a_chapter_that_cannot_be_shown_is_named_with_its_reason(executed, change, says):
    edit(executed.chapter, change)
    (fault,) = chapter_faults(load_catalog())
    assert fault.startswith("toy (book/chapters/toy.ipynb): ")
    assert says in fault


# ---------------------------------------------------------------- build


def test_a_missing_chapter_fails_the_build_by_name(house):
    with pytest.raises(BookError, match=r"toy \(book/chapters/toy\.ipynb\): toy\.ipynb is missing") as error:
        book.build()
    assert "leantrain run --profile book toy" in str(error.value)
    assert not (house.root / "_build" / "html").exists()


def test_a_second_build_is_refused(executed):
    folder = executed.root / "_build"
    folder.mkdir()
    with FileLock(folder / ".book.lock"), pytest.raises(BookError, match="another build"):
        book.build()


def test_the_renderers_output_is_shown_when_it_fails(executed, monkeypatch):
    def fail(command, **options):
        assert options["env"]["LEANTRAIN_ROOT"] == str(executed.root)
        assert {"--warningiserror", "--nitpick"} <= set(command)
        return subprocess.CompletedProcess(command, 1, "reading\n", "\x1b[31ma.md:3: WARNING: no such thing\x1b[0m\n")

    monkeypatch.setattr(book.subprocess, "run", fail)
    with pytest.raises(BookError, match=r"status 1:\na\.md:3: WARNING: no such thing$"):
        book.build()


def test_a_renderer_that_hangs_is_stopped(executed, monkeypatch):
    def hang(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(book.subprocess, "run", hang)
    with pytest.raises(BookError, match="longer than 2 s"):
        book.build(timeout=2)


# ---------------------------------------------------------------- PDF

BROWSER = """#!{python}
import pathlib, sys
target = next(a.removeprefix("--print-to-pdf=") for a in sys.argv if a.startswith("--print-to-pdf="))
page = pathlib.Path(sys.argv[-1].removeprefix("file://")).read_text()
if "fail" in page:
    sys.exit("no display")
pathlib.Path(target).write_bytes(b"%PDF-1.4 " + page.encode())
"""


@pytest.fixture
def printer(executed, monkeypatch, tmp_path):
    """A browser that writes the page it is given, and a renderer that writes a page."""
    program = tmp_path / "browser"
    program.write_text(BROWSER.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("CHROMIUM", str(program))

    def print_page(text):
        def render(output, timeout, *options):
            assert options[-1] == "singlehtml"
            page = Path(output, "_build", "singlehtml", "book", "index.html")
            page.parent.mkdir(parents=True)
            page.write_text(text)

        monkeypatch.setattr(book, "_render", render)
        return book.build_pdf()

    return print_page


def test_the_pdf_has_links_within_and_to_the_web_but_none_to_files(printer, executed):
    page = (
        '<a class="x" href="book/index.html#id3">1</a> <a href="#id4">2</a> <a href="https://arxiv.org/abs/1">3</a> '
        '<a class="y" href="book/scoreboard.csv">4</a> <link href="_static/custom.css" rel="stylesheet">'
    )
    written = printer(page)
    assert written == executed.root / "_build" / "training-for-less.pdf"
    assert written.read_text() == (
        '%PDF-1.4 <a class="x" href="#id3">1</a> <a href="#id4">2</a> <a href="https://arxiv.org/abs/1">3</a> '
        '<a class="y">4</a> <link href="_static/custom.css" rel="stylesheet">'
    )
    assert [path.name for path in written.parent.iterdir() if path.name.startswith(".pdf")] == []


def test_an_older_pdf_stands_when_printing_fails(printer):
    written = printer("first")
    with pytest.raises(BookError, match=r"printed no PDF \(status 1\):\nno display"):
        printer("fail")
    assert written.read_text() == "%PDF-1.4 first"


def test_without_a_browser_the_error_says_how_to_get_one(executed, monkeypatch):
    monkeypatch.setenv("CHROMIUM", "no-such-browser")
    with pytest.raises(BookError, match=r"no program named no-such-browser: install one .*CHROMIUM"):
        book.build_pdf()


def test_importing_the_book_module_pulls_in_no_numerical_library():
    code = "import sys, leantrain.book; print([m for m in ('torch', 'numpy', 'pandas', 'sphinx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_part_of_the_real_catalogue_has_its_opening_page_that_lists_its_papers():
    root = Path(__file__).parents[1]
    catalog: Catalog = load_catalog(root / "book" / "papers.yml")
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (root / "book" / "parts").glob("*.md")}
    assert set(pages) == {part.slug for part in catalog.parts}
    for slug, text in pages.items():
        assert f"```{{paper-list}}\n:part: {slug}\n```" in text
