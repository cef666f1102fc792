"""Training for Less: twenty-three papers on cheaper neural-network training, replicated."""

__version__ = "0.1.0"
__all__ = ["__version__"]
