"""YAML, read strictly: what a hand-written file must not hold is refused, with the place where it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

__all__ = ["UnreadableYaml", "read_yaml"]


class UnreadableYaml(ValueError):
    """A file is missing, is no YAML, or gives a key twice; the message says which, where, and names the file."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader; of two values for one key, it would silently keep the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name = (key.tag, key.value)
                if name in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
                seen.add(name)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path, what: str) -> Any:
    """Read a YAML file.

    Args:
        path: The file.
        what: What the file is, for the message.

    Raises:
        UnreadableYaml: If it cannot be read, is no YAML, or gives a key twice.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UnreadableYaml(f"cannot read {what} {path.name}: {error.strerror}") from None
    except RecursionError:
        raise UnreadableYaml(f"{what} {path.name} is no valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, ArithmeticError, AttributeError, TypeError) as error:
        # PyYAML leaves it to Python to refuse the 13th month, `!!bool maybe` or a number of 5,000 digits.
        raise UnreadableYaml(f"{what} {path.name} is no valid YAML: {error}") from None
