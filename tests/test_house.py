"""Rules of the house that no single file can keep: layers, documentation, lock, licence of words."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest

from leantrain import paths
from leantrain.cli import main

LIBRARY = paths.ROOT / "lib" / "leantrain"
MODULES = sorted(p for p in LIBRARY.rglob("*.py"))
PAGES = [paths.ROOT / name for name in ("README.md", "CONTRIBUTING.md", "book/scaling.md")]


def name_of(path):
    return ".".join(path.relative_to(LIBRARY.parent).with_suffix("").parts).removesuffix(".__init__")


def tracked():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=paths.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [paths.ROOT / name for name in done.stdout.split("\0") if name]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is_and_what_is_public(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    names = [t.id for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign)
             for t in (n.targets if isinstance(n, ast.Assign) else [n.target]) if isinstance(t, ast.Name)]  # fmt: skip
    if path.name != "__init__.py":
        assert "__all__" in names
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_imports_run_one_way():
    """Techniques and emulators can be used by someone who deletes the rest of the book."""
    upper = {
        "book",
        "catalog",
        "chapter",
        "cli",
        "experiment",
        "parameters",
        "ray_engine",
        "records",
        "runner",
        "sphinx_ext",
        "worker",
    }
    for path in MODULES:
        room = path.relative_to(LIBRARY).parts[0]
        if room not in ("techniques", "hardware", "training", "measure", "data"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                parts = module.split(".")
                if parts[0] != "leantrain" or len(parts) < 2:
                    continue
                assert parts[1] not in upper, f"{name_of(path)} imports {module}"
                if room == "techniques" and parts[1] == "techniques":
                    assert parts[1:] == list(path.relative_to(LIBRARY).with_suffix("").parts), "techniques stand alone"


def test_library_code_is_honest():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), path.name
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node)
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("pickle.load", "pickle.loads", "eval", "exec"), path.name


def test_the_lock_pins_every_dependency_exactly():
    lines = [line for line in paths.LOCK.read_text().splitlines() if line]
    pins = {}
    for line in lines:
        match = re.fullmatch(r"([a-z0-9-]+)==([\w.+!]+)( ; [^#]+)? # via .+", line)
        assert match, f"not a plain pin with what brought it in: {line!r}"
        pins[match[1]] = match[2]
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.match(r"[\w-]+", w)[0].lower().replace("_", "-") for w in wanted}
    assert names <= set(pins)
    assert pins["torch"].startswith("2.14.")
    assert pins["torchvision"].startswith("0.29.")
    assert int(pins["jupyter-book"].split(".")[0]) < 2


def test_conda_users_get_the_same_lock():
    import yaml

    environment = yaml.safe_load((paths.ROOT / "environment.yml").read_text())
    assert environment["dependencies"][-1] == {"pip": ["-r requirements.lock"]}
    assert [d for d in environment["dependencies"] if isinstance(d, str)] == ["python=3.11", "pip", "make"]


def test_no_committed_file_names_a_machine():
    """No absolute folder of a workplace, and nothing that a build, a cache or a download leaves."""
    pattern = re.compile(rf"/(root|home|Users|tmp|private)/\w|{re.escape(str(paths.ROOT))}/")
    for path in tracked():
        relative = path.relative_to(paths.ROOT).as_posix()
        assert not relative.startswith(("_build/", ".venv/")), relative
        assert not relative.startswith("data/") or relative.startswith("data/cards/") or relative == "data/README.md"
        if path.suffix in (".py", ".md", ".yml", ".toml", ".ipynb", ".css", ".bib", ".lock", ".cff") and path.exists():
            found = pattern.search(path.read_text(encoding="utf-8"))
            # Tests name such folders on purpose, to see that they are found.
            assert relative.startswith("tests/") or not found, f"{relative}: {found and found[0]}"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_the_pages_exist(page):
    commands = [line for block in blocks(page, "sh") for line in block.splitlines()]
    commands += re.findall(r"`(leantrain [^`]+)`", page.read_text(encoding="utf-8"))
    assert commands
    makefile = (paths.ROOT / "Makefile").read_text()
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
        if words[:1] == ["leantrain"]:
            arguments = [w if w != "SLUG" else "gqkva" for w in words[2:]]
            # A mention such as `leantrain show` lacks its argument; unknown options and commands still fail.
            main.commands[words[1]].make_context(words[1], arguments, resilient_parsing=len(words) == 2)


#: Commands of the README that no test runs, and why.
NOT_RUN = {
    "make book": "the tests of the book render it; every chapter's quick run is a test of its notebook",
    "make test": "runs these tests",
    "leantrain data fetch cifar10": "needs a network; the tests of the store download from a local server",
    "leantrain run gqkva adan --profile book": "takes half an hour; the published chapters are its results",
    "leantrain run gqkva --profile paper --dry-run": "the tests of dry runs start every chapter so",
}


def commands_of_the_readme():
    lines = "".join(blocks(paths.ROOT / "README.md", "sh")).splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines]


def test_every_reason_to_run_no_test_belongs_to_a_command():
    assert set(NOT_RUN) <= set(commands_of_the_readme())


@pytest.fixture(scope="module")
def copy_of_the_project(tmp_path_factory):
    """What the commands read; what they write stays in the copy."""
    root = tmp_path_factory.mktemp("project")
    for name in ("book", "notebooks", "data"):
        shutil.copytree(paths.ROOT / name, root / name, ignore=shutil.ignore_patterns("chapters", ".ipynb_checkpoints"))
    for name in ("requirements.lock", "_config.yml", "pyproject.toml"):
        shutil.copy(paths.ROOT / name, root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands_of_the_readme() if c not in NOT_RUN])
def test_the_readmes_commands_run(command, copy_of_the_project):
    program, *words = shlex.split(command)
    assert program == "leantrain"
    environment = {**os.environ, "LEANTRAIN_ROOT": str(copy_of_the_project), "PYTHONPATH": str(LIBRARY.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "leantrain.cli", *words],
        cwd=copy_of_the_project, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if words[0] == "run":
        assert f"{words[1]}: done" in done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_in_the_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (paths.ROOT / target).exists(), target


def test_the_example_in_the_readme_runs():
    (example,) = blocks(paths.ROOT / "README.md", "python")
    namespace = {}
    exec(compile(example, "README.md", "exec"), namespace)
    assert sum(p.numel() for p in namespace["model"].parameters()) == 18_798_184
