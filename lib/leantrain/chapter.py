"""What a notebook speaks to: its paper, its parameters, its experiments, its measurements and verdicts.

from leantrain.chapter import Chapter

chapter = Chapter("gqkva", globals())   # checks the parameters before anything runs
chapter.card()                          # title card, with badges that the verdict cell fills in
...
chapter.measure("gqkva.size-gkva3", Estimate.exact(4.02))
chapter.verdicts()                      # decides every claim and leaves the record in the notebook
chapter.provenance()
"""

from __future__ import annotations

import datetime
import html
import importlib.metadata
import inspect
import os
import platform
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from leantrain import paths
from leantrain.catalog import Claim, Decision, Quantity, load_catalog
from leantrain.parameters import RESOURCES, ParameterError, check_parameters, parameters_of
from leantrain.records import MIME, Fingerprint, Provenance, Record, fingerprint

if TYPE_CHECKING:
    from leantrain.experiment import Arm, Build, Experiment
    from leantrain.measure.statistics import Estimate

# tqdm, which several libraries load, advises every notebook to install a progress bar that the book does not use.
warnings.filterwarnings("ignore", message="IProgress not found")

__all__ = ["Chapter", "badge", "card_html", "claims_html", "commit_of_tree", "format_quantity"]

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "lightning",
    "torchmetrics",
    "numpy",
    "numba",
    "scipy",
    "pandas",
    "scikit-learn",
)


class Chapter:
    """One run of one chapter.

    Args:
        slug: The paper's slug.
        namespace: The notebook's `globals()`. The parameters are read from it, checked, and put back in their types.

    Attributes:
        paper: The paper's row in the catalogue.
        profile: The scale of this run: quick, book or paper.
        parameters: All parameters by name, checked.

    Raises:
        UnknownPaper: If no paper has the slug.
        ParameterError: If a parameter is unknown, ill-typed, out of range or not finite.
    """

    def __init__(self, slug: str, namespace: MutableMapping[str, Any]) -> None:
        self._started = datetime.datetime.now(datetime.UTC)
        self._clock = time.monotonic()
        self.paper = load_catalog().paper(slug)
        known = parameters_of(self.paper.notebook_path)
        self.parameters = check_parameters(known, _given(namespace, known))
        namespace.update(self.parameters)
        self.profile = self.parameters["profile"]
        # Taken at the start: a run measures what stood then, even if the tree changes while it runs.
        self._fingerprint: Fingerprint = fingerprint(self.paper)
        self._commit, self._modified = commit_of_tree()
        self._measured: dict[str, dict[str, Quantity]] = {}
        self._data: dict[str, str] = {}
        self._experiments: list[Experiment] = []
        self._card: Any = None
        from leantrain.plotting import use_style

        use_style()

    def card(self) -> None:
        """Show the title card: the problem, the idea, what is tested, and a badge for each headline claim."""
        from IPython.display import display

        self._card = display(
            self._bundle(card_html(self.paper, None), str(self.paper.title)), raw=True, display_id=True
        )

    def source(self, *objects: object) -> None:
        """Show the source of library objects, without their docstrings, highlighted."""
        from IPython.display import display
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import PythonLexer

        code = "\n\n".join(_without_docstring(inspect.getsource(o)) for o in objects)  # type: ignore[arg-type]
        shown = highlight(code, PythonLexer(), HtmlFormatter(cssclass="highlight lt-source"))
        display(self._bundle(shown, code), raw=True)

    def experiment(
        self,
        arms: Mapping[str, Build | Arm],
        data: Any,
        *,
        epochs: int,
        seeds: Iterable[int] | None = None,
        **options: Any,
    ) -> Experiment:
        """An experiment bound to this chapter: its seeds, its folder of finished runs, its record.

        Args:
            arms: Name -> function of the seed that builds a LightningModule.
            data: The data module.
            epochs: Passes over the training data.
            seeds: By default the parameter `seeds`.
            options: Further fields of `Experiment`. In a dry run, every epoch ends after two batches.
        """
        from leantrain.experiment import Experiment

        if self.parameters.get("dry_run"):
            options["limit_batches"] = 2
        reached = {**self._fingerprint.modules, **self._fingerprint.packages}
        experiment = Experiment(
            arms,
            data,
            list(self.parameters["seeds"] if seeds is None else seeds),
            epochs,
            cache=paths.BUILD / "experiments" / self.paper.slug,
            salt=" ".join(f"{name}:{mark}" for name, mark in reached.items()),
            **options,
        )
        self._experiments.append(experiment)
        for source in experiment.sources:
            self.used(source.checksums)
        return experiment

    def used(self, checksums: Mapping[str, str]) -> None:
        """Note the data that the chapter read, by file or array -> SHA-256, for the record."""
        self._data.update(checksums)

    def measure(self, claim_id: str, main: Estimate | None = None, /, **named: Estimate) -> None:
        """Record what was measured for a claim.

        Args:
            claim_id: The claim's id.
            main: The claim's own quantity, in the claim's unit.
            named: The quantities that its rule names, and others that the text names beside them.

        Raises:
            CatalogError: If the paper has no such claim.
            ValueError: If it was measured before, is out of reach at this profile, a value is not finite, or a
                quantity that its rule needs is missing.
        """
        claim = self.paper.claim(claim_id)
        given = {**({} if main is None else {"main": main}), **named}
        needed = claim.rule.quantities
        if not needed <= set(given):
            raise ValueError(f"claim {claim_id} needs the quantities {sorted(needed)}, got {sorted(given)}")
        if claim_id in self._measured:
            raise ValueError(f"claim {claim_id} was measured twice in one run")
        if self.profile in claim.out_of_reach:
            raise ValueError(
                f"the catalogue says that {claim_id} is out of reach at {self.profile}; it cannot be measured there"
            )
        fields = ("value", "low", "high", "n", "level", "method")
        self._measured[claim_id] = {
            name: Quantity(**{field: getattr(estimate, field) for field in fields}) for name, estimate in given.items()
        }

    def verdict(self, claim_id: str) -> Decision:
        """The verdict on a claim that was measured.

        Raises:
            CatalogError: If the paper has no such claim.
        """
        return self.paper.claim(claim_id).decide(self._measured.get(claim_id))

    def verdicts(self, *, draft: bool = False) -> None:
        """Decide every claim, show the table, fill in the card, and leave the record in the notebook.

        Args:
            draft: Claims may still be unmeasured. A draft leaves no record: its run never counts as complete.

        Raises:
            ValueError: If a claim that can be tested at this profile was not measured.
        """
        from IPython.display import display

        missing = [c.id for c in self.paper.claims if self.profile not in c.out_of_reach and c.id not in self._measured]
        if missing and not draft:
            raise ValueError(
                f"these claims can be tested at {self.profile} and were not measured: {', '.join(missing)}"
            )
        if self.parameters.get("dry_run"):
            self._measured.clear()  # Numbers from stand-in data decide nothing.
        decisions = [(claim, self._measured.get(claim.id), self.verdict(claim.id)) for claim in self.paper.claims]
        text = "\n".join(f"{claim.id}: {decision}" for claim, _, decision in decisions)
        bundle = self._bundle(claims_html(decisions, self.profile), text)
        if not draft:
            record = Record(
                slug=self.paper.slug,
                profile=self.profile,
                parameters=self.parameters,
                measurements=self._measured,
                fingerprint=self._fingerprint,
                provenance=self._provenance(),
            )
            bundle[MIME] = record.model_dump(mode="json")
        display(bundle, raw=True)
        if self._card is not None:
            verdicts = {claim.id: decision for claim, _, decision in decisions}
            self._card.update(self._bundle(card_html(self.paper, verdicts), str(self.paper.title)), raw=True)

    def provenance(self) -> None:
        """Show where and when this run was made."""
        from IPython.display import display

        p = self._provenance()
        commit = (p.commit or "unknown")[:12] + (" with local changes" if p.modified else "")
        rows = {
            "Profile": self.profile,
            "Started": p.started,
            "Wall time": f"{p.wall_s:.0f} s",
            "Commit": commit,
            "Processor": f"{p.processor}, {p.cores} cores, {p.threads} threads, {p.memory_gib:.0f} GiB",
            "Accelerator": p.accelerator or "none",
            "System": f"{p.system}, Python {p.python}",
            "Packages": ", ".join(f"{name} {version}" for name, version in p.packages.items()),
            "Training runs": f"{p.runs}, {p.runs_from_cache} of them finished by an earlier, interrupted run",
            "Data": ", ".join(f"{name} {digest[:12]}" for name, digest in p.data.items()) or "generated here",
            "Parameters": ", ".join(f"{name} = {value!r}" for name, value in self.parameters.items()),
        }
        body = "".join(
            f"<tr><th scope='row'>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items()
        )
        text = "\n".join(f"{k}: {v}" for k, v in rows.items())
        display(self._bundle(f"<table class='lt-provenance'>{body}</table>", text), raw=True)

    def _provenance(self) -> Provenance:
        import torch

        cuda = torch.cuda.is_available()
        return Provenance(
            commit=self._commit,
            modified=self._modified,
            started=self._started.strftime("%Y-%m-%d %H:%M UTC"),
            wall_s=round(time.monotonic() - self._clock, 1),
            processor=_processor(),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            memory_gib=round(_memory_bytes() / 2**30, 1),
            accelerator=torch.cuda.get_device_name() if cuda else None,
            python=platform.python_version(),
            system=f"{platform.system()} {platform.machine()}",
            packages={name: importlib.metadata.version(name) for name in _PACKAGES},
            data=dict(self._data),
            runs=sum(e.trained + e.reused for e in self._experiments),
            runs_from_cache=sum(e.reused for e in self._experiments),
        )

    @staticmethod
    def _bundle(markup: str, text: str) -> dict[str, Any]:
        return {"text/html": markup, "text/plain": text}


def _given(namespace: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters among the names of a notebook that has just started.

    Right after the parameters cell a notebook holds nothing but parameters, imports (constants in capitals among them)
    and IPython's own names: any other plain value was injected under a name that the chapter does not have, which
    papermill only warns about.
    """
    # papermill hands on the whole profile file, and with it what the run needs of a cluster.
    shell = {"In", "Out", "exit", "quit", "get_ipython", "open", RESOURCES}
    plain = (bool, int, float, str, list, tuple, dict, type(None))
    strangers = [
        name
        for name, value in namespace.items()
        if not name.startswith("_")
        and not name.isupper()
        and name not in shell
        and name not in known
        and isinstance(value, plain)
    ]
    if strangers:
        raise ParameterError(
            f"unknown parameter {', '.join(map(repr, strangers))}; this chapter has {', '.join(known)}"
        )
    missing = [name for name in known if name not in namespace]
    if missing:
        raise ParameterError(f"run the parameters cell first: {', '.join(missing)} not set")
    return {name: namespace[name] for name in known}


def _without_docstring(source: str) -> str:
    """Cut docstrings, so that the code shows; they can be read in the library."""
    import ast

    source = textwrap.dedent(source)
    lines = source.splitlines()
    drop: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                drop |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
                if (first.end_lineno or 0) < len(lines) and not lines[first.end_lineno or 0].strip():
                    drop.add((first.end_lineno or 0) + 1)
    return "\n".join(line for number, line in enumerate(lines, start=1) if number not in drop)


def commit_of_tree() -> tuple[str | None, bool]:
    """The commit of the project's tree, and whether files of the library or the notebooks differ from it."""
    try:
        git = ["git", "-C", str(paths.ROOT)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20, check=True)
        tracked = ["lib", "requirements.lock", "book/papers.yml"]
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", *tracked], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None, False
    return head.stdout.strip(), bool(changed.stdout.strip())


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        query = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _number(x: float) -> str:
    return f"{x:.3g}" if abs(x) < 100 else f"{x:,.0f}"


def format_quantity(quantity: Quantity, unit: str) -> str:
    """A value with its interval and the number of runs: `1.93 x [1.88, 1.97], n = 5`; an exact one without."""
    suffix = f" {unit}" if unit else ""
    if quantity.low == quantity.high == quantity.value and quantity.method == "exact":
        return f"{quantity.value:.4g}{suffix}"
    return f"{_number(quantity.value)}{suffix} [{_number(quantity.low)}, {_number(quantity.high)}], n = {quantity.n}"


def badge(decision: Decision) -> str:
    """A verdict as HTML: the word, a sign and a colour, so that none of them is needed alone."""
    kind = {"out of reach here": "out-of-reach"}.get(str(decision.verdict), str(decision.verdict).replace(" ", "-"))
    tail = " <span class='lt-indicative'>indicative</span>" if decision.indicative else ""
    sign = f"<span aria-hidden='true'>{decision.verdict.sign}</span>"
    return f"<span class='lt-badge lt-badge--{kind}'>{sign} {decision.verdict}{tail}</span>"


def card_html(paper: Any, verdicts: Mapping[str, Decision] | None) -> str:
    """The title card of a chapter; without verdicts the badges wait."""
    e = html.escape
    where = f"<cite>{e(paper.title)}</cite>. {e(paper.venue)}, {paper.year}"
    if paper.authors:
        where = f"{e(', '.join(paper.authors))}. {where}"
    if paper.arxiv:
        where += f". <a href='https://arxiv.org/abs/{paper.arxiv}'>arXiv:{paper.arxiv}</a>"
    rows = "".join(
        f"<dt>{name}</dt><dd>{e(text)}</dd>"
        for name, text in (("The problem", paper.problem), ("The idea", paper.idea), ("What we test", paper.tests))
    )
    items = []
    for claim in paper.claims:
        if claim.headline:
            mark = (
                badge(verdicts[claim.id])
                if verdicts
                else "<span class='lt-badge lt-badge--planned'>… under test</span>"
            )
            items.append(f"<li>{mark} {e(claim.sentence)}</li>")
    return f"<div class='lt-card'><p>{where}.</p><dl>{rows}</dl><ul class='lt-verdicts'>{''.join(items)}</ul></div>"


def claims_html(decisions: Iterable[tuple[Claim, Mapping[str, Quantity] | None, Decision]], profile: str) -> str:
    """The table of claims: what the paper says, what was measured here, the rule, the verdict."""
    e = html.escape
    rows = []
    for claim, measured, decision in decisions:
        paper = claim.paper_text
        if claim.paper is not None and claim.stated == "unverified":
            paper += " (unverified)"
        if measured is None:
            here = claim.out_of_reach.get(profile, "Not measured.")  # type: ignore[call-overload]
        else:
            here = "; ".join(
                ("" if name == "main" else f"{name.replace('_', ' ')}: ") + format_quantity(q, claim.unit_of(name))
                for name, q in measured.items()
            )
        rule = " and ".join(map(str, claim.rule.reproduced))
        cells = [
            ("Claim", f"{e(claim.sentence)} <small>{e(claim.conditions)}; {claim.tested}</small>"),
            ("Paper", e(paper)),
            ("Here", e(here)),
            ("Reproduced if", e(rule)),
            ("Verdict", badge(decision)),
        ]
        row = "".join(f"<td role='cell' data-label='{label}'>{body}</td>" for label, body in cells)
        rows.append(f"<tr role='row' id='claim-{claim.id.replace('.', '-')}'>{row}</tr>")
    labels = ("Claim", "Paper", "Here", "Reproduced if", "Verdict")
    head = "".join(f"<th scope='col' role='columnheader'>{label}</th>" for label in labels)
    # Roles keep it a table for screen readers where the style sheet of a phone lays rows out as cards.
    return (
        f"<table class='lt-claims' role='table'><thead role='rowgroup'><tr role='row'>{head}</tr></thead>"
        f"<tbody role='rowgroup'>{''.join(rows)}</tbody></table>"
    )
