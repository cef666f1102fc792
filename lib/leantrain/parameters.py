"""The parameters of a chapter: read from the notebook's parameters cell, checked before anything runs.

A parameters cell is plain Python that papermill understands, one annotated assignment a parameter, with a
comment whose part after the last `;` is the allowed range:

    seeds: list[int] = [0, 1, 2]  # one training run per seed and arm; each 0 to 2147483647, unique
    learning_rate: float = 3e-3   # peak of the schedule; 1e-6 to 1
    profile: str = "quick"        # scale of the run; one of quick, book, paper
    dry_run: bool = False         # two batches of stand-in data, to test a profile

Annotation and range are the whole specification: the notebook, the command line and the tests read this line.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import math
import re
import reprlib
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leantrain.strict_yaml import UnreadableYaml, read_yaml

__all__ = [
    "RESOURCES",
    "Parameter",
    "ParameterError",
    "Resources",
    "check_parameters",
    "parameters_of",
    "parse_parameters",
    "read_profile",
    "read_resources",
]

#: The one key of a profile file that is no parameter: what a run at that profile needs of a cluster.
RESOURCES = "resources"

_TYPES: dict[str, tuple[type, bool]] = {
    "bool": (bool, False),
    "int": (int, False),
    "float": (float, False),
    "str": (str, False),
    "list[int]": (int, True),
    "list[float]": (float, True),
    "list[str]": (str, True),
}
_SHORT = reprlib.Repr()
_SHORT.maxstring = 80
_RANGE = re.compile(r"^(\S+) to (\S+)$")


class ParameterError(ValueError):
    """A parameter is unknown, of the wrong type, out of range or not finite; the message says what to write."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a chapter.

    Attributes:
        name: Its name.
        annotation: One of bool, int, float, str, list[int], list[float], list[str].
        default: The value at the `quick` profile.
        help: What it means, in a few words.
        low: Smallest value (of each element), or None.
        high: Largest value (of each element), or None.
        choices: The values allowed, or an empty tuple.
        unique: Whether the elements of a list must differ.
    """

    name: str
    annotation: str
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    unique: bool = False

    @property
    def expected(self) -> str:
        """Type and range in words, for messages and help."""
        words = self.annotation
        if self.choices:
            words += f", {'each ' if self._listed else ''}one of {', '.join(self.choices)}"
        elif self.low is not None:
            words += f", {'each ' if self._listed else ''}from {self.low:g} to {self.high:g}"
        if self._listed:
            words += ", not empty" + (", no value twice" if self.unique else "")
        return words

    @property
    def _listed(self) -> bool:
        return _TYPES[self.annotation][1]

    def check(self, value: object) -> Any:
        """Return the value in the parameter's type.

        An int is taken for a float; nothing else is converted.

        Raises:
            ParameterError: If type or range is not met.
        """
        kind, listed = _TYPES[self.annotation]
        if not listed:
            return self._check_one(value, kind, value)
        if not isinstance(value, list | tuple):
            raise self._error(value)
        if not value:
            raise self._error(value, "the list is empty")
        values = [self._check_one(v, kind, value) for v in value]
        if self.unique and len(set(values)) < len(values):
            raise self._error(value, "a value stands twice")
        return values

    def _check_one(self, value: object, kind: type, whole: object) -> Any:
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                value = float(value)
            except OverflowError:
                raise self._error(whole, "it is not finite") from None
        if type(value) is not kind:
            hint = "YAML reads 1e-3 as text; write 1.0e-3" if isinstance(value, str) and _is_number(value) else ""
            raise self._error(whole, hint)
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(whole, "it is not finite")
        if self.choices and value not in self.choices:
            raise self._error(whole)
        if self.low is not None and not self.low <= value <= self.high:  # type: ignore[operator]
            raise self._error(whole)
        return value

    def from_text(self, text: str) -> Any:
        """Read a value that was typed on a command line, such as `1e-3`, `true` or `0,1,2`.

        Raises:
            ParameterError: If the text is not of the parameter's type or out of range.
        """
        kind, listed = _TYPES[self.annotation]
        if not listed:
            return self.check(self._one_from_text(text.strip(), kind, text))
        body = text.strip().removeprefix("[").removesuffix("]")
        items = [item.strip().strip("'\"") for item in body.split(",")] if body.strip() else []
        return self.check([self._one_from_text(item, kind, text) for item in items])

    def _one_from_text(self, item: str, kind: type, whole: str) -> Any:
        if kind is str:
            return item
        if kind is bool:
            if item.lower() not in ("true", "false"):
                raise self._error(whole, "write true or false")
            return item.lower() == "true"
        try:
            return kind(item)
        except ValueError:
            raise self._error(whole) from None

    def _error(self, value: object, why: str = "") -> ParameterError:
        try:
            given = f"{_SHORT.repr(value):.80} ({type(value).__name__})"
        except ValueError:  # Python does not write numbers of more than 4,300 digits
            given = f"a very long number ({type(value).__name__})"
        return ParameterError(
            f"parameter {self.name!r} was given {given}; expected {self.expected}{'; ' + why if why else ''}"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse_parameters(source: str) -> dict[str, Parameter]:
    """Read a parameters cell.

    Args:
        source: The cell's code.

    Raises:
        ParameterError: If it is no Python, or a line is no annotated assignment of a plain value, has no range or a
            default that breaks it, or names a parameter again.
    """
    try:
        lines = ast.parse(source).body
        comments = {
            token.start[0]: token.string.lstrip("# ").strip()
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise ParameterError(f"parameters cell: no valid Python: {error}") from None
    found: dict[str, Parameter] = {}
    for node in lines:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.value is None:
            line = ast.unparse(node)
            raise ParameterError(f"parameters cell: {line!r} must read `name: type = value  # meaning; range`")
        name, annotation = node.target.id, ast.unparse(node.annotation)
        if annotation not in _TYPES:
            raise ParameterError(f"parameter {name!r} has the type {annotation}; expected one of {', '.join(_TYPES)}")
        try:
            default = ast.literal_eval(node.value)
        except (ValueError, TypeError, RecursionError, MemoryError):
            raise ParameterError(
                f"parameter {name!r} must have a plain value, not {ast.unparse(node.value)!r}"
            ) from None
        if name in found:
            raise ParameterError(f"parameter {name!r} stands twice in the parameters cell")
        parameter = _with_range(name, annotation, default, comments.get(node.end_lineno or 0, ""))
        found[name] = Parameter(**{**parameter.__dict__, "default": parameter.check(default)})
    return found


def _with_range(name: str, annotation: str, default: object, comment: str) -> Parameter:
    kind, listed = _TYPES[annotation]
    if kind is bool:
        return Parameter(name, annotation, default, comment)
    help_text, _, spec = comment.rpartition(";")
    rest = spec.strip()
    unique = listed and rest.endswith(", unique")
    rest = rest.removesuffix(", unique")
    if listed:
        rest = rest.removeprefix("each ")
    if rest.startswith("one of ") and kind is str:
        choices = tuple(c.strip() for c in rest.removeprefix("one of ").split(","))
        return Parameter(name, annotation, default, help_text.strip(), choices=choices, unique=unique)
    match = _RANGE.match(rest)
    if match and kind is not str and all(map(_is_number, match.groups())):
        low, high = map(float, match.groups())
        if low <= high:
            return Parameter(name, annotation, default, help_text.strip(), low, high, unique=unique)
    wanted = "one of A, B" if kind is str else "LOW to HIGH"
    raise ParameterError(f"parameter {name!r} needs a range at the end of its comment, `; {wanted}`, got {comment!r}")


def parameters_of(notebook: Path) -> dict[str, Parameter]:
    """The parameters of a chapter's source.

    Raises:
        ParameterError: If the notebook cannot be read, has no cell tagged `parameters`, or more than one, or a faulty
            one.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        tagged = [
            "".join(c["source"])
            for c in cells
            if c["cell_type"] == "code" and "parameters" in c["metadata"].get("tags", [])
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ParameterError(f"{notebook.name} is no readable notebook") from None
    if len(tagged) != 1:
        raise ParameterError(f"{notebook.name} must have one cell tagged 'parameters', it has {len(tagged)}")
    return parse_parameters(tagged[0])


def check_parameters(known: Mapping[str, Parameter], given: Mapping[str, object]) -> dict[str, Any]:
    """Check given values and fill in the defaults.

    Raises:
        ParameterError: On an unknown name, or a value that its parameter refuses.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ParameterError(f"unknown parameter {', '.join(map(repr, unknown))}; this chapter has {', '.join(known)}")
    return {name: p.check(given[name]) if name in given else p.default for name, p in known.items()}


@dataclass(frozen=True)
class Resources:
    """What one run needs of a cluster.

    Attributes:
        cpus: Processor cores, 1 to 1024; also the threads that the run computes with.
        gpus: GPUs, 0 to 64. A run that asks for none sees none.
    """

    cpus: int = 2
    gpus: int = 0

    def __str__(self) -> str:
        return f"{self.cpus} CPUs and {self.gpus} GPUs"


def read_profile(path: Path) -> dict[str, Any]:
    """Read a papermill parameter file, without what it says of resources.

    Raises:
        ParameterError: If it is missing, no YAML mapping, or gives a parameter twice.
    """
    return {name: value for name, value in _read_mapping(path).items() if name != RESOURCES}


def read_resources(path: Path, default: Resources) -> Resources:
    """What a profile file asks of a cluster, such as `resources: {cpus: 8, gpus: 1}`.

    A number that it leaves out is the default's.

    Raises:
        ParameterError: If the file cannot be read, or asks for something else than whole numbers in range.
    """
    given = _read_mapping(path).get(RESOURCES, {})
    ranges = {"cpus": (1, 1024), "gpus": (0, 64)}
    if not isinstance(given, dict) or not all(
        name in ranges and type(number) is int and ranges[name][0] <= number <= ranges[name][1]
        for name, number in given.items()
    ):
        raise ParameterError(
            f"the profile file {path.name} has {RESOURCES}: {given!r}; "
            f"expected cpus (1 to 1024) and gpus (0 to 64), such as {RESOURCES}: {{cpus: 8, gpus: 1}}"
        )
    return dataclasses.replace(default, **given)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path, "the profile file")
    except UnreadableYaml as error:
        raise ParameterError(str(error)) from None
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise ParameterError(f"the profile file {path.name} must map parameter names to values")
    return values
