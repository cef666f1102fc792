"""Accelerators, emulated: what their papers share, and one module a paper.

The common core is read in this order:

* `workloads`: the layers of a network with their shapes, found by running it on the
  meta device, and the small networks that the emulator chapters train;
* `trace`: the zero masks (and values) of activations, weights and gradients of a network in training;
* `lowering`: how the three products of a layer become streams of operands for a processing element;
* `energy`: relative costs of an access and of a cycle;
* `reports`: what a training run logged of its traces, as tidy tables again.

An emulator (`tensordash`, ...) takes a configuration, a workload or a trace, and returns a tidy table.
"""

__all__ = [
    "energy",
    "fpraker",
    "gradient_sparsity",
    "lowering",
    "procrustes",
    "reports",
    "tensordash",
    "trace",
    "workloads",
]
