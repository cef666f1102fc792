"""Records: what a run measured, read out of the executed notebook that measured it.

An executed notebook is the only place where a result lives. Its verdict cell carries a `Record` as data
beside the table that people read, and `finish` stamps the notebook complete after every code cell ran, in
order and without error. `read_record` refuses any other notebook, and `freshness` says whether the code,
the library, the parameters, the claims and the lock are still those that the record saw.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from leantrain import paths
from leantrain.catalog import Catalog, Paper, Profile, Quantity
from leantrain.data.registry import DATASETS
from leantrain.parameters import ParameterError, check_parameters, parameters_of, read_profile

__all__ = [
    "MIME",
    "Fingerprint",
    "Freshness",
    "IncompleteRun",
    "Provenance",
    "Record",
    "check_executed",
    "fingerprint",
    "finish",
    "freshness",
    "profile_parameters",
    "published_records",
    "read_record",
]

MIME = "application/vnd.leantrain.record+json"

#: Modules that show, store or start runs, and the list of data sets, whose files are compared by their checksums. They
#: cannot change what a run measures, so a change in them makes no record stale; verdicts are made again from the
#: measurements at every build.
PRESENTING = frozenset(
    f"leantrain.{name}"
    for name in [
        "book",
        "catalog",
        "chapter",
        "cli",
        "data.registry",
        "parameters",
        "paths",
        "plotting",
        "ray_engine",
        "records",
        "replication",
        "runner",
        "scaffold",
        "sphinx_ext",
        "strict_yaml",
        "worker",
    ]
)


class IncompleteRun(ValueError):
    """A notebook holds no complete run; the message says why."""


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Fingerprint(_Row):
    """What a run depends on: hashes of the notebook's code, the library modules it reaches and the claims, and the
    locked versions of the packages that this code imports, directly or through other packages.
    """

    notebook: str
    modules: dict[str, str]
    claims: dict[str, str]
    packages: dict[str, str]


class Provenance(_Row):
    """Where and when a record was made. Holds no host name, user name or path."""

    commit: str | None
    modified: bool
    started: str
    wall_s: float
    processor: str
    cores: int
    threads: int
    memory_gib: float
    accelerator: str | None
    python: str
    system: str
    packages: dict[str, str]
    data: dict[str, str]
    runs: int
    runs_from_cache: int


class Record(_Row):
    """The measurements of one executed chapter, with what is needed to judge and to repeat them."""

    version: Literal[1] = 1
    slug: str
    profile: Profile
    parameters: dict[str, Any]
    measurements: dict[str, dict[str, Quantity]]
    fingerprint: Fingerprint
    provenance: Provenance


@dataclass(frozen=True)
class Freshness:
    """Whether a record still describes the tree, and what changed if not."""

    changes: list[str] = field(default_factory=list)

    @property
    def state(self) -> Literal["fresh", "stale"]:
        """`fresh` when nothing changed."""
        return "stale" if self.changes else "fresh"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _code_hash(source: str) -> str:
    """Hash of Python code that comments, docstrings and layout do not change."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return _hash(ast.dump(tree))


def _source(cell: Mapping[str, Any]) -> str:
    return "".join(cell["source"])


def _tags(cell: Mapping[str, Any]) -> list[str]:
    return cell.get("metadata", {}).get("tags", [])


def _code_cells(notebook: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [c for c in notebook["cells"] if c["cell_type"] == "code" and _source(c).strip()]


def _module_file(name: str) -> Path | None:
    base = paths.ROOT.joinpath("lib", *name.split("."))
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if file.is_file():
            return file
    return None


def _is_package(name: str) -> bool:
    return paths.ROOT.joinpath("lib", *name.split("."), "__init__.py").is_file()


def _imports(source: str, package: str) -> Iterable[tuple[str, str | None]]:
    """(module, imported name) of each leantrain import in the code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


#: Packages of the lock whose import name is not their own.
_IMPORTED_AS = {
    "IPython": "ipython",
    "PIL": "pillow",
    "art": "adversarial-robustness-toolbox",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}

_LOCKED = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>[^\s;]+)[^#]*(?:# via (?P<via>.*))?$")


def reached_packages(texts: Iterable[str]) -> dict[str, str]:
    """Locked versions of the packages that code imports, and of those that they need in turn.

    The lock says of every package which others brought it in. A package outside the lock cannot be told apart
    from a change of the lock, so code that imports one depends on the whole lock.
    """
    versions: dict[str, list[str]] = {}
    needs: dict[str, set[str]] = {}
    for line in paths.LOCK.read_text(encoding="utf-8").splitlines():
        found = _LOCKED.match(line)
        if found:
            name = found["name"]
            versions.setdefault(name, []).append(found["version"])
            for parent in (found["via"] or "").split(", "):
                needs.setdefault(parent, set()).add(name)
    queue = []
    for top in {module.split(".")[0] for text in texts for module, _ in _imports(text, "leantrain")}:
        name = _IMPORTED_AS.get(top, top.lower().replace("_", "-"))
        if name in versions:
            queue.append(name)
        elif top not in ("", "leantrain") and top not in sys.stdlib_module_names:
            queue = list(versions)
            break
    reached: set[str] = set()
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            queue += needs.get(name, ())
    return {name: ", ".join(versions[name]) for name in sorted(reached)}


def reached_modules(sources: Iterable[str]) -> dict[str, str]:
    """Modules of the library that the code reaches, with the hash of each.

    A package's `__init__` only passes names on: an import from it leads to the module that defines the name.
    The presenting modules are left out.
    """
    queue = [(m, n, "") for source in sources for m, n in _imports(source, "")]
    queue.append(("leantrain.experiment", None, ""))
    found: dict[str, str] = {}
    seen: set[tuple[str, str | None]] = set()
    while queue:
        module, name, _ = queue.pop()
        if (module, name) in seen or module.split(".")[0] != "leantrain" or module in PRESENTING:
            continue
        seen.add((module, name))
        if _is_package(module):
            queue += [(m, n, module) for m, n in _through_package(module, name)]
            continue
        file = _module_file(module)
        if file is None:
            continue
        text = file.read_text(encoding="utf-8")
        found[module] = _code_hash(text)
        package = module.rpartition(".")[0]
        queue += [(m, n, package) for m, n in _imports(text, package)]
    return dict(sorted(found.items()))


def _through_package(package: str, name: str | None) -> list[tuple[str, str | None]]:
    """Where a name imported from a package comes from; every submodule if that cannot be told."""
    folder = paths.ROOT.joinpath("lib", *package.split("."))
    if name is not None:
        if _module_file(f"{package}.{name}"):
            return [(f"{package}.{name}", None)]
        text = (folder / "__init__.py").read_text(encoding="utf-8")
        sources = [m for m, n in _imports(text, package) if n == name and m.startswith(package + ".")]
        if sources:
            return [(m, None) for m in sources]
    if package == "leantrain":
        return []
    return [(f"{package}.{file.stem}", None) for file in folder.glob("*.py") if file.stem != "__init__"]


def fingerprint(paper: Paper) -> Fingerprint:
    """What a run of the paper's chapter depends on now, its parameters aside."""
    notebook = json.loads(paper.notebook_path.read_text(encoding="utf-8"))
    sources = [_source(c) for c in _code_cells(notebook) if "parameters" not in _tags(c)]
    modules = reached_modules(sources)
    library = [file.read_text(encoding="utf-8") for name in modules if (file := _module_file(name))]
    return Fingerprint(
        notebook=_hash("\n".join(_code_hash(s) for s in sources)),
        modules=modules,
        claims={c.id: c.digest for c in paper.claims},
        packages=reached_packages([*sources, *library]),
    )


def profile_parameters(paper: Paper, profile: str, given: Mapping[str, object] | None = None) -> dict[str, Any]:
    """The values of all parameters at a profile, checked, with single values replaced by the given ones.

    Raises:
        ParameterError: On a faulty value or a missing profile file.
    """
    known = parameters_of(paper.notebook_path)
    values: dict[str, object] = {}
    if profile != "quick":
        values = read_profile(paths.PROFILES / profile / f"{paper.slug}.yml")
        if values.get("profile", profile) != profile:
            raise ParameterError(f"the {profile} profile of {paper.slug} sets profile to {values['profile']!r}")
    return check_parameters(known, {**values, "profile": profile, **(given or {})})


def freshness(record: Record, paper: Paper, expected: Mapping[str, object] | None = None) -> Freshness:
    """Compare a record with the tree.

    Args:
        record: The record of a complete run.
        paper: The paper that it belongs to.
        expected: Parameters that the run should have had; by default those of the record's profile.
    """
    now, then = fingerprint(paper), record.fingerprint
    changes = []
    if now.notebook != then.notebook:
        changes.append("the notebook's code")
    for module in sorted(set(now.modules) | set(then.modules)):
        if now.modules.get(module) != then.modules.get(module):
            changes.append(f"module {module}")
    for claim in sorted(set(now.claims) | set(then.claims)):
        if now.claims.get(claim) != then.claims.get(claim):
            changes.append(f"the rule of claim {claim}")
    for name in sorted(set(now.packages) | set(then.packages)):
        if now.packages.get(name) != then.packages.get(name):
            before, after = then.packages.get(name, "not reached"), now.packages.get(name, "not reached")
            changes.append(f"package {name} ({before} then, {after} now)")
    known = {path: digest for one in DATASETS.values() for path, digest in one.checksums.items()}
    for path, digest in sorted(record.provenance.data.items()):
        if known.get(path, digest) != digest:
            changes.append(f"data {path}")
    wanted = profile_parameters(paper, record.profile) if expected is None else expected
    for name in sorted(set(wanted) | set(record.parameters)):
        if wanted.get(name) != record.parameters.get(name):
            changes.append(f"parameter {name} ({record.parameters.get(name)!r} then, {wanted.get(name)!r} now)")
    return Freshness(changes)


def check_executed(notebook: Mapping[str, Any]) -> None:
    """Check that every code cell ran, in order, without an error.

    Raises:
        IncompleteRun: Naming the first cell that did not.
    """
    for position, cell in enumerate(_code_cells(notebook), start=1):
        where = f"code cell {position} ({_source(cell).strip().splitlines()[0][:50]!r})"
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                raise IncompleteRun(f"{where} raised {output['ename']}: {output['evalue'][:300]}")
        if cell["execution_count"] is None:
            raise IncompleteRun(f"{where} did not run")
        if cell["execution_count"] != position:
            raise IncompleteRun(f"{where} has execution count {cell['execution_count']}: cells ran out of order")


def _record_json(notebook: Mapping[str, Any]) -> dict[str, Any]:
    bundles = [
        output["data"][MIME]
        for cell in _code_cells(notebook)
        for output in cell["outputs"]
        if MIME in output.get("data", {})
    ]
    if len(bundles) != 1:
        raise IncompleteRun(f"the notebook holds {len(bundles)} records; its verdict cell makes one")
    return bundles[0]


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def finish(notebook: dict[str, Any]) -> Record:
    """Check an executed notebook and stamp it complete, in place.

    Raises:
        IncompleteRun: If a cell did not run or failed, or the record is missing or faulty.
    """
    check_executed(notebook)
    raw = _record_json(notebook)
    record = _parse(raw)
    notebook["metadata"]["leantrain"] = {"complete": True, "record_sha256": _digest(raw)}
    return record


def _parse(raw: object) -> Record:
    try:
        return Record.model_validate(raw)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise IncompleteRun(f"the record is faulty: {faults}") from None


def read_record(path: Path) -> Record:
    """The record of a complete run.

    Raises:
        IncompleteRun: If the file is missing, no notebook, not stamped complete, or differs from its stamp.
    """
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        stamp = notebook["metadata"].get("leantrain", {})
    except FileNotFoundError:
        raise IncompleteRun(f"{path.name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise IncompleteRun(f"{path.name} is no readable notebook") from None
    if not isinstance(stamp, dict) or not stamp.get("complete"):
        raise IncompleteRun(f"{path.name} is not complete: {_cause(stamp)}")
    try:
        check_executed(notebook)
        raw = _record_json(notebook)
    except (KeyError, TypeError, AttributeError, IndexError):
        raise IncompleteRun(f"{path.name} is no readable notebook") from None
    if _digest(raw) != stamp.get("record_sha256"):
        raise IncompleteRun(f"{path.name}: the record was changed after the run")
    return _parse(raw)


def _cause(stamp: object) -> object:
    return stamp.get("cause", "it has no completion stamp") if isinstance(stamp, dict) else "its stamp is none"


def published_records(catalog: Catalog, profile: Profile | None = None) -> dict[str, Record]:
    """Complete records by slug: of the published chapters, or of this machine's runs at a profile."""
    found = {}
    for paper in catalog.entries:
        path = paper.chapter_path if profile is None else run_path(paper, profile)
        try:
            found[paper.slug] = read_record(path)
        except IncompleteRun:
            continue
    return found


def run_path(paper: Paper, profile: str) -> Path:
    """Where a run of a chapter lands: `book` runs in the book, others in the build folder."""
    return paper.chapter_path if profile == "book" else paths.BUILD / "runs" / profile / f"{paper.slug}.ipynb"


def strip_paths(text: str) -> str:
    """Replace the project's folder and the home folder in a message, so that no output names a machine's paths."""
    text = text.replace(str(paths.ROOT) + "/", "")
    try:
        home = str(Path.home())
    except RuntimeError:  # an account without an entry, and no HOME
        return text
    return re.sub(re.escape(home) + r"(?=/)", "~", text)
