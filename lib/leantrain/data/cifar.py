"""Read the CIFAR-10 batches without executing them.

The authors store each batch as a Python pickle, and loading a pickle can run any code that it names. Here the
pickle's instructions are only listed (`pickletools`), held against the few that a batch is made of, and the labels
and pixels are taken from their arguments.
"""

from __future__ import annotations

import pickletools
from pathlib import Path

import numpy as np

from leantrain.data.errors import CorruptData

__all__ = ["read_batch"]

_PIXELS = 3 * 32 * 32
# What a batch needs to name: the three that rebuild a NumPy array.
_NAMES = frozenset({"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"})
_OPCODES = frozenset(
    {
        *("PROTO", "STOP", "MARK", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
        *("EMPTY_DICT", "SETITEMS", "EMPTY_LIST", "APPENDS", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("BININT", "BININT1", "BININT2", "SHORT_BINSTRING", "BINSTRING", "NONE", "NEWFALSE"),
        *("GLOBAL", "REDUCE", "BUILD"),
    }
)
_KEYS = frozenset({"batch_label", "labels", "data", "filenames"})


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one batch file.

    Args:
        path: `data_batch_1` to `data_batch_5` or `test_batch`, as the authors' archive holds them.

    Returns:
        Images ``(N, 3, 32, 32)``, uint8, and labels ``(N,)``, int64, both in the file's order.

    Raises:
        CorruptData: If the file is no such batch, or a pickle that would do more than build one.
    """
    key, labels, pixels = "", [], b""
    content = path.read_bytes()
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name not in _OPCODES or (opcode.name == "GLOBAL" and argument not in _NAMES):
                what = f"{opcode.name} {argument}" if argument is not None else opcode.name
                raise CorruptData(f"{path.name}: not a CIFAR-10 batch; its pickle holds {what!r:.100}: refused")
            if opcode.name == "SHORT_BINSTRING" and argument in _KEYS:
                key = argument
            elif key == "labels" and opcode.name == "BININT1":
                labels.append(argument)
            elif key == "data" and opcode.name == "BINSTRING" and isinstance(argument, str):
                pixels = argument.encode("latin-1")
    except ValueError as error:
        raise CorruptData(f"{path.name}: not a readable CIFAR-10 batch ({error})") from error
    if not labels or len(pixels) != len(labels) * _PIXELS:
        raise CorruptData(f"{path.name}: {len(labels)} labels with {len(pixels)} bytes of pixels, not {_PIXELS} each")
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32)
    return images, np.array(labels, np.int64)
