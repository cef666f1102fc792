"""The book's one visual style (placeholder until its owner writes it)."""


def use_style() -> None:
    """Set it."""
