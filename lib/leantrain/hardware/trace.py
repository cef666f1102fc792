"""Traces: which operands of a network in training are zero.

`capture` watches the convolutions and linear layers of any PyTorch model during one forward and one backward pass and
keeps the zero masks of their inputs, weights and output gradients, packed to one bit a value (and the values, if
asked).
`TraceCallback` does so within a Lightning training run. A trace is saved as one safetensors file and a JSON manifest.

The masks are taken the moment a tensor passes, so nothing that overwrites it later can change them. The gradient comes
from a hook on the layer's output tensor, put there before an in-place ReLU can follow: autograd then hands over the
gradient of the output as the layer made it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from leantrain.hardware.lowering import Operand
from leantrain.hardware.workloads import Layer, layer_of
from leantrain.paths import write_atomically
from leantrain.training import ImageClassifier

__all__ = [
    "InputMask",
    "LayerTrace",
    "Packed",
    "Precision",
    "Recorder",
    "Trace",
    "TraceCallback",
    "TracedClassifier",
    "capture",
]

Precision = Literal["float32", "bfloat16"]
#: A further mask of a layer's input, the same shape as the input; None where the layer has none.
InputMask = Callable[[Tensor], Tensor | None]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_OPERANDS: tuple[Operand, ...] = ("input", "weight", "grad_output")
_FORMAT = 1


@dataclass(frozen=True)
class Packed:
    """The zero mask of a tensor, eight values in a byte.

    Attributes:
        shape: Shape of the tensor.
        bits: Flat bits, True where the value is not zero, the lowest bit of a byte first.
        nonzero: Number of values that are not zero.
    """

    shape: tuple[int, ...]
    bits: NDArray[np.uint8]
    nonzero: int

    @classmethod
    def of(cls, mask: NDArray[np.bool_]) -> Packed:
        """Pack a boolean array, True where the value is not zero."""
        return cls(tuple(mask.shape), np.packbits(mask, bitorder="little"), int(np.count_nonzero(mask)))

    def mask(self) -> NDArray[np.bool_]:
        """The boolean array again."""
        size = int(np.prod(self.shape))
        return np.unpackbits(self.bits, count=size, bitorder="little").view(np.bool_).reshape(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape))

    @property
    def sparsity(self) -> float:
        """Share of zeros, 0 to 1."""
        return 1.0 - self.nonzero / self.size


@dataclass(frozen=True)
class LayerTrace:
    """The operands of one layer.

    Attributes:
        layer: The layer's geometry.
        masks: Zero masks of "input" (N, C, H, W), "weight" (K, C / groups, kh, kw) and "grad_output" (N, K, OH, OW);
            (N, C), (K, C) and (N, K) for a linear layer.
        values: The same tensors as float32 arrays, if they were kept.
        extra: Further masks of the input, by the names that `capture` was given for them.
    """

    layer: Layer
    masks: Mapping[Operand, Packed]
    values: Mapping[Operand, NDArray[np.float32]] = field(default_factory=dict)
    extra: Mapping[str, Packed] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Images, or samples of a linear layer."""
        return self.masks["input"].shape[0]


@dataclass(frozen=True)
class Trace:
    """The operands of the layers of a network in one training step.

    Attributes:
        layers: One entry a layer, in the order of execution.
        precision: The number format to which values were rounded before zeros were counted.
        notes: Where the trace comes from: network, epoch, seed, ...
    """

    layers: tuple[LayerTrace, ...]
    precision: Precision
    notes: Mapping[str, str | int | float] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of the masks and the values."""
        return sum(
            sum(mask.bits.nbytes for mask in (*entry.masks.values(), *entry.extra.values()))
            + sum(v.nbytes for v in entry.values.values())
            for entry in self.layers
        )

    def save(self, path: Path) -> None:
        """Write `path`.safetensors and then, as the sign that it is whole, `path`.json.

        Both files are written under another name and renamed; the manifest holds the checksum of the tensors.
        """
        from safetensors.numpy import save

        tensors = {}
        for number, entry in enumerate(self.layers):
            for name, mask in entry.masks.items():
                tensors[f"{number}.{name}.mask"] = mask.bits
            for label, mask in entry.extra.items():
                tensors[f"{number}.{label}.extra"] = mask.bits
            for name, values in entry.values.items():
                tensors[f"{number}.{name}.values"] = np.ascontiguousarray(values)
        content = save(tensors)
        manifest = {
            "format": _FORMAT,
            "sha256": hashlib.sha256(content).hexdigest(),
            "precision": self.precision,
            "notes": dict(self.notes),
            "layers": [
                {
                    "layer": asdict(entry.layer),
                    "masks": {name: {"shape": m.shape, "nonzero": m.nonzero} for name, m in entry.masks.items()},
                    "values": sorted(entry.values),
                    "extra": {name: {"shape": m.shape, "nonzero": m.nonzero} for name, m in entry.extra.items()},
                }
                for entry in self.layers
            ],
        }
        write_atomically(path.with_suffix(".safetensors"), content)
        write_atomically(path.with_suffix(".json"), json.dumps(manifest, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read a trace that `save` wrote.

        Raises:
            ValueError: If the manifest is of another format, or the tensors do not match it.
        """
        from safetensors.numpy import load

        manifest = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if manifest.get("format") != _FORMAT:
            raise ValueError(f"{path} is a trace of format {manifest.get('format')!r}; expected {_FORMAT}: trace again")
        content = path.with_suffix(".safetensors").read_bytes()
        if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
            raise ValueError(f"{path} does not match the checksum in its manifest: trace again")
        tensors = load(content)
        layers = []
        for number, entry in enumerate(manifest["layers"]):
            shape_fields = ("kernel", "stride", "padding", "dilation", "in_size", "out_size")
            fields: dict[str, Any] = {k: tuple(v) if k in shape_fields else v for k, v in entry["layer"].items()}
            layer = Layer(**fields)
            masks = {
                name: Packed(tuple(mask["shape"]), tensors[f"{number}.{name}.mask"], mask["nonzero"])
                for name, mask in entry["masks"].items()
            }
            extra = {
                name: Packed(tuple(mask["shape"]), tensors[f"{number}.{name}.extra"], mask["nonzero"])
                for name, mask in entry.get("extra", {}).items()
            }
            values = {name: tensors[f"{number}.{name}.values"] for name in entry["values"]}
            layers.append(LayerTrace(layer, masks, values, extra))
        return cls(tuple(layers), manifest["precision"], manifest["notes"])


def _as_lowered(tensor: Tensor, layer: Layer) -> Tensor:
    """An operand in the shape of the layer's table; of a linear layer over tokens, (N, T, C) becomes (N, C, T, 1)."""
    if layer.kind == "linear":
        return tensor
    if tensor.ndim == 2:
        return tensor[:, :, None, None]
    return tensor.movedim(-1, 1)[..., None] if tensor.ndim == 3 else tensor


class Recorder:
    """What `capture` yields: it collects the operands and makes the trace when the pass is over.

    Args:
        names: The layers to wait for.
        samples: Keep the first so many samples of the batch; None keeps all.
        precision: Format to round to before zeros are counted.
        values: Whether the values are kept as well.
        limit: Bytes that must not be passed.
        also: Further masks to take of the layers' inputs.
    """

    def __init__(
        self,
        names: Sequence[str],
        samples: int | None,
        precision: Precision,
        values: bool,
        limit: int,
        also: Mapping[str, InputMask],
    ) -> None:
        self._names, self._samples, self._precision = names, samples, precision
        self._values, self._limit, self._bytes, self._also = values, limit, 0, also
        self._masks: dict[str, dict[Operand, Packed]] = {}
        self._kept: dict[str, dict[Operand, NDArray[np.float32]]] = {}
        self._layers: dict[str, Layer] = {}
        self._extra: dict[str, dict[str, Packed]] = {}

    def note(self, name: str, operand: Operand, tensor: Tensor) -> None:
        """Keep the zero mask of one operand of a layer that has started."""
        tensor = tensor.detach()
        if operand != "weight" and self._samples is not None:
            tensor = tensor[: self._samples]
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the {operand} of layer {name!r} holds NaN or infinity; a diverged run cannot be traced")
        rounded = tensor.to(_DTYPES[self._precision])
        rounded = _as_lowered(rounded, self._layers[name])
        packed = Packed.of((rounded != 0).cpu().numpy())  # -0.0 compares equal to zero
        self._count(name, packed.bits.nbytes + (4 * packed.size if self._values else 0))
        self._masks[name][operand] = packed
        if self._values:
            self._kept[name][operand] = rounded.float().cpu().numpy().copy()

    def note_extra(self, name: str, x: Tensor) -> None:
        """Keep the further masks of the input of a layer that has started."""
        for label, rule in self._also.items():
            mask = rule(x)
            if mask is None:
                continue
            if mask.dtype != torch.bool or mask.shape != x.shape:
                raise ValueError(
                    f"mask {label!r} of layer {name!r} is {mask.dtype} of shape {tuple(mask.shape)}; expected bool "
                    f"of shape {tuple(x.shape)}"
                )
            mask = mask if self._samples is None else mask[: self._samples]
            packed = Packed.of(_as_lowered(mask, self._layers[name]).cpu().numpy())
            self._count(name, packed.bits.nbytes)
            self._extra[name][label] = packed

    def _count(self, name: str, size: int) -> None:
        self._bytes += size
        if self._bytes > self._limit:
            raise ValueError(
                f"the trace passes {self._limit} bytes at layer {name!r}; trace fewer samples or raise limit_bytes"
            )

    def start(self, name: str, layer: Layer) -> None:
        """Open the entry of a layer; each layer may run once."""
        if name in self._layers:
            raise ValueError(
                f"layer {name!r} ran twice within one capture; trace one forward and one backward pass at a time"
            )
        self._layers[name] = layer
        self._masks[name] = {}
        self._kept[name] = {}
        self._extra[name] = {}

    def trace(self, notes: Mapping[str, str | int | float] | None = None) -> Trace:
        """The trace of the pass.

        Args:
            notes: Where it comes from; kept in the manifest.

        Raises:
            ValueError: If a layer has not run, or no gradient has reached its output.
        """
        for name in self._names:
            missing = [operand for operand in _OPERANDS if operand not in self._masks.get(name, {})]
            if missing:
                raise ValueError(
                    f"layer {name!r} has no {' and no '.join(missing)}; capture a forward and a backward pass"
                )
        entries = tuple(
            LayerTrace(layer, self._masks[n], self._kept[n], self._extra[n]) for n, layer in self._layers.items()
        )
        return Trace(entries, self._precision, dict(notes or {}))


@contextmanager
def capture(
    model: nn.Module,
    layers: Collection[str] | None = None,
    *,
    samples: int | None = None,
    precision: Precision = "float32",
    values: bool = False,
    limit_bytes: int = 1 << 30,
    also: Mapping[str, InputMask] | None = None,
) -> Iterator[Recorder]:
    """Watch one forward and one backward pass of a model.

    Use it as `with capture(model) as recorder: loss(model(x), y).backward()`, then `recorder.trace()`. The pass itself
    is not changed; the hooks are taken off at the end, whatever happens.

    Args:
        model: The model; its `nn.Conv2d` and `nn.Linear` modules are watched.
        layers: Names of the modules to watch; all by default.
        samples: Keep only the first so many samples of the batch.
        precision: Round to this format before looking for zeros.
        values: Keep the values as well as the masks.
        limit_bytes: Refuse to hold more.
        also: Further masks to take of the layers' inputs, by name. Each is a function of the input tensor, called in
            the forward pass, that returns booleans of its shape, or None where a layer has no such mask.

    Yields:
        An object whose `trace()` returns the `Trace`.

    Raises:
        ValueError: If a name is unknown, a value is NaN or infinite, a layer runs twice, or the limit is passed.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    names = list(found) if layers is None else list(layers)
    unknown = [name for name in names if name not in found]
    if unknown or not names:
        raise ValueError(f"layers {unknown} are no convolutions or linear layers of the model; it has {list(found)}")
    if precision not in _DTYPES:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(_DTYPES)}")
    if samples is not None and samples < 1:
        raise ValueError(f"samples is {samples}; expected at least 1")
    recorder = Recorder(names, samples, precision, values, limit_bytes, also or {})
    handles = []
    for name in names:

        def watch(module: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name) -> None:
            recorder.start(name, layer_of(name, module, args[0], output))
            recorder.note(name, "input", args[0])
            recorder.note_extra(name, args[0])
            recorder.note(name, "weight", cast(Tensor, module.weight))
            if output.requires_grad:
                output.register_hook(lambda gradient: recorder.note(name, "grad_output", gradient))

        handles.append(found[name].register_forward_hook(watch))
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


class TraceCallback(L.Callback):
    """Trace the last training batch of chosen epochs, within a Lightning run and without changing it.

    Args:
        samples: Keep only the first so many samples of the batch.
        epochs: Numbers of the epochs to trace, from 0; all by default.
        precision: Round to this format before looking for zeros.
        report: Called with each trace; the numbers it returns become metrics of the epoch
            (`trainer.callback_metrics`), and the trace is dropped. Without it the traces are kept in `traces`.
        folder: Save each trace here, as epoch-000.safetensors and epoch-000.json and so on.
        values: Keep the values as well as the masks.
        also: Further masks of the layers' inputs, see `capture`.

    Attributes:
        traces: The traces so far, if there is no `report`.
    """

    def __init__(
        self,
        *,
        samples: int | None = 16,
        epochs: Collection[int] | None = None,
        precision: Precision = "float32",
        report: Callable[[Trace], Mapping[str, float]] | None = None,
        folder: Path | None = None,
        values: bool = False,
        also: Mapping[str, InputMask] | None = None,
    ) -> None:
        self.samples, self.epochs, self.precision, self.values = samples, epochs, precision, values
        self.report, self.folder, self.also = report, folder, also
        self.traces: list[Trace] = []
        self._open: tuple[Recorder, ExitStack] | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the hooks on before the last batch of an epoch."""
        last = batch_idx + 1 == trainer.num_training_batches
        if last and (self.epochs is None or trainer.current_epoch in self.epochs):
            stack = ExitStack()
            watch = capture(
                pl_module, samples=self.samples, precision=self.precision, values=self.values, also=self.also
            )
            self._open = (stack.enter_context(watch), stack)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the hooks off, and keep or report the trace."""
        if self._open is None:
            return
        (recorder, stack), self._open = self._open, None
        stack.close()
        trace = recorder.trace({"epoch": trainer.current_epoch, "step": trainer.global_step})
        if self.folder is not None:
            trace.save(self.folder / f"epoch-{trainer.current_epoch:03d}")
        if self.report is None:
            self.traces.append(trace)
        else:
            # Not by `log_dict`: Lightning builds a metric object for each name, seconds for hundreds of them.
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.report(trace).items()})

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the hooks off when a run fails within the traced batch."""
        if self._open is not None:
            self._open[1].close()
            self._open = None


class TracedClassifier(ImageClassifier):
    """An image classifier that logs what an emulator makes of the last batch of every epoch.

    Args:
        model: The model.
        optimizer: Builds the optimiser from parameter groups.
        num_classes: Number of classes.
        report: Turns a trace into numbers; they become metrics of the epoch.
        samples: Samples of the batch to trace.
        warmup_fraction: Share of the steps in which the learning rate rises.
        precision: Round to this format before looking for zeros.
        values: Keep the values as well as the masks.
        also: Further masks of the layers' inputs, see `capture`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        *,
        num_classes: int,
        report: Callable[[Trace], Mapping[str, float]],
        samples: int = 16,
        warmup_fraction: float = 0.1,
        precision: Precision = "float32",
        values: bool = False,
        also: Mapping[str, InputMask] | None = None,
    ) -> None:
        super().__init__(model, optimizer, num_classes=num_classes, warmup_fraction=warmup_fraction)
        self.tracer = TraceCallback(samples=samples, precision=precision, report=report, values=values, also=also)

    def configure_callbacks(self) -> list[L.Callback]:
        """Hand the tracing callback to the trainer."""
        return [self.tracer]
