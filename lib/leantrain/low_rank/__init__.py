"""Low-rank decomposition of layers: what the chapters on it share.

* `ranks`: ranks from a compression ratio or from a share of the energy;
* `factors`: the decomposed layers, how a model's layers are replaced by them, and which factors train;
* `latency`: ranks from measured times.
"""

__all__ = ["factors", "latency", "ranks"]
