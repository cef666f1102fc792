"""Reports: what a training run logged of its traces, as tidy tables again."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pandas as pd

from leantrain.hardware.workloads import PRODUCTS

__all__ = ["read_columns", "read_products"]


def read_columns(
    frame: pd.DataFrame, keep: Sequence[str], names: Sequence[str], labels: Sequence[str], example: str
) -> pd.DataFrame:
    """Turn columns whose names have three parts into one row a first and second part.

    Args:
        frame: A table with such columns beside others.
        keep: Columns to keep.
        names: The columns to turn, named "first/second/quantity".
        labels: Names for the three parts.
        example: A column that an emulator logs, for the message.

    Returns:
        The kept columns, the first two labels, and a column for each quantity.

    Raises:
        ValueError: If there are no such columns.
    """
    if not names:
        raise ValueError(f"the table has no columns of a cycle report, such as {example!r}")
    long = frame.melt([*keep], names, value_name="value")
    long[list(labels)] = long["variable"].str.split("/", expand=True)
    index = [*keep, *labels[:2]]
    wide = long.pivot(index=index, columns=labels[2], values="value").dropna(how="all").reset_index()
    return wide.rename_axis(columns=None)


def read_products(frame: pd.DataFrame, keep: Sequence[str], sums: Collection[str], example: str) -> pd.DataFrame:
    """Turn the columns "configuration/product/quantity" of a cycle report into a tidy table.

    Args:
        frame: A table with such columns beside others.
        keep: Columns to keep.
        sums: The quantities that the emulator logs.
        example: A column that it logs, for the message.

    Returns:
        One row a row of `frame`, configuration and product: the kept columns, config, product, and the quantities.

    Raises:
        ValueError: If there are no such columns.
    """
    parts = {column: column.split("/") for column in frame.columns if column.count("/") == 2}
    names = [column for column, (_, product, what) in parts.items() if product in PRODUCTS and what in sums]
    return read_columns(frame, keep, names, ["config", "product", "quantity"], example)
