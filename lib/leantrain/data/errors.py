"""What can be wrong with data: not here, or here but not what it should be."""

from __future__ import annotations

__all__ = ["CorruptData", "DataError", "MissingData"]


class DataError(RuntimeError):
    """A data set cannot be used; the message says why and what to do."""


class MissingData(DataError):
    """A data set is not here and, if a download was asked for, could not be had."""


class CorruptData(DataError):
    """A file is here but is not the file that the registry knows, or what it holds is out of range."""
