"""The rendered book depends on what is committed, not on the folder, the clock, the network or the machine."""

from __future__ import annotations

import json
import os
import re

import pytest

from leantrain import book

NO_NETWORK = """
import socket

def refuse(self, address, *rest):
    if self.family != getattr(socket, "AF_UNIX", None):
        raise OSError(f"there is no network here, and something asked for {address}")

socket.socket.connect = socket.socket.connect_ex = refuse
"""


@pytest.mark.slow
def test_two_builds_in_other_places_and_time_zones_are_equal_and_need_no_network(small_book, tmp_path, monkeypatch):
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline" / "sitecustomize.py").write_text(NO_NETWORK)
    path = [str(tmp_path / "offline"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pages = []
    for zone, place in (("UTC", tmp_path / "one"), ("Pacific/Kiritimati", tmp_path / "two" / "ünd drei")):
        monkeypatch.setenv("TZ", zone)
        place.mkdir(parents=True)
        html = book.build(place).parent
        found = {p.relative_to(html).as_posix(): p.read_text(encoding="utf-8") for p in html.rglob("*.html")}
        # The one thing that may differ: the day of the build.
        day = re.compile(r"\b\w{3} \d{1,2}, 20\d\d\b|\b20\d\d-\d\d-\d\d\b")
        pages.append({name: day.sub("", text) for name, text in found.items()})
    first, second = pages
    assert set(first) == set(second)
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ({"output_type": "stream", "name": "stdout", "text": "x" * 20_000_000}, "20,000,000 characters"),
        (
            {"output_type": "display_data", "metadata": {}, "data": {"text/html": "<tr><td>1</td></tr>" * 10_000}},
            "190,000 characters",
        ),
        ({"output_type": "stream", "name": "stderr", "text": "\r".join(map(str, range(10_000)))}, "progress-bar"),
    ],
    ids=["20 MB", "a table of 10,000 rows", "a progress bar of 10,000 steps"],
)
def test_outputs_that_no_page_can_show_stop_the_build_by_name(executed, output, says):
    notebook = json.loads(executed.chapter.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code[1]["outputs"].append(output)
    executed.chapter.write_text(json.dumps(notebook))
    with pytest.raises(book.BookError, match=rf"code cell 2 shows .*{says}"):
        book.build()
