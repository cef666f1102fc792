"""Measurements: estimates with intervals, paired timing, arithmetic and memory cost.

The names are loaded when they are first used, so that ``leantrain.measure.statistics`` can be imported
without PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leantrain.measure.cost import count_macs, count_parameters, optimizer_state_bytes
    from leantrain.measure.memory import saved_activation_bytes
    from leantrain.measure.statistics import Estimate, mean_interval, median_interval, paired_difference
    from leantrain.measure.timing import PairedTiming, paired_timing

__all__ = [
    "Estimate",
    "PairedTiming",
    "count_macs",
    "count_parameters",
    "mean_interval",
    "median_interval",
    "optimizer_state_bytes",
    "paired_difference",
    "paired_timing",
    "saved_activation_bytes",
]

_HOME = {
    "Estimate": "statistics",
    "PairedTiming": "timing",
    "count_macs": "cost",
    "count_parameters": "cost",
    "mean_interval": "statistics",
    "median_interval": "statistics",
    "optimizer_state_bytes": "cost",
    "paired_difference": "statistics",
    "paired_timing": "timing",
    "saved_activation_bytes": "memory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
