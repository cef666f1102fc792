"""Energy: relative costs of a memory access and of a multiply-accumulate, and the power of a core.

The costs of an access are our assumption for the book's emulators, not the paper's: they keep the well-known order of
magnitude between a register-sized scratchpad, an on-chip buffer and DRAM. Ratios between two designs depend on them, so
a chapter that shows an energy ratio shows this table too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Literal

__all__ = ["BFLOAT16_TILE", "FPRAKER_TILE", "TENSORDASH_FP32", "AccessEnergy", "CorePower", "TileCost"]


@dataclass(frozen=True)
class AccessEnergy:
    """Energy of one access to a 16-bit value, relative to one 16-bit multiply-accumulate.

    Attributes:
        dram: Off-chip memory.
        buffer: The on-chip memories that all tiles share.
        scratchpad: The memory beside a tile that fills its staging buffers.
        mac: One multiply-accumulate.
    """

    dram: float = 200.0
    buffer: float = 6.0
    scratchpad: float = 1.0
    mac: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 < getattr(self, field.name) < float("inf"):
                raise ValueError(
                    f"{field.name} is {getattr(self, field.name)}; a relative energy is positive and finite"
                )


@dataclass(frozen=True)
class CorePower:
    """Area and power of the parts of an accelerator's cores.

    Attributes:
        area_mm2: Area of each part in square millimetres.
        power_mw: Power of each part in milliwatts.
        added: The parts that the dense baseline does not have.
    """

    area_mm2: MappingProxyType[str, float]
    power_mw: MappingProxyType[str, float]
    added: tuple[str, ...]

    def __post_init__(self) -> None:
        if set(self.area_mm2) != set(self.power_mw) or not set(self.added) < set(self.area_mm2):
            raise ValueError("area_mm2 and power_mw must name the same parts, and added a part of them")

    def total(self, quantity: Literal["area_mm2", "power_mw"], design: Literal["sparse", "dense"]) -> float:
        """The sum over the parts of a design, in the unit that the quantity's name ends with."""
        if design not in ("sparse", "dense"):
            raise ValueError(f"design is {design!r}; expected 'sparse' or 'dense'")
        parts: MappingProxyType[str, float] = getattr(self, quantity)
        return sum(value for part, value in parts.items() if design == "sparse" or part not in self.added)

    @property
    def power_ratio(self) -> float:
        """Power of the dense design over power of the sparse one; below 1."""
        return self.total("power_mw", "dense") / self.total("power_mw", "sparse")


@dataclass(frozen=True)
class TileCost:
    """Area and power of one tile.

    Attributes:
        area_um2: Area of each part in square micrometres.
        power_mw: Power of each part in milliwatts.
    """

    area_um2: MappingProxyType[str, float]
    power_mw: MappingProxyType[str, float]

    def __post_init__(self) -> None:
        if set(self.area_um2) != set(self.power_mw):
            raise ValueError("area_um2 and power_mw must name the same parts")

    def total(self, quantity: Literal["area_um2", "power_mw"]) -> float:
        """The sum over the parts, in the unit that the quantity's name ends with."""
        return float(sum(getattr(self, quantity).values()))


#: The tiles that we use for FPRaker and its baseline, 65 nm. We could not check these numbers in the paper.
FPRAKER_TILE = TileCost(
    area_um2=MappingProxyType({"processing elements": 304118.0, "term encoders": 12950.0}),
    power_mw=MappingProxyType({"processing elements": 104.0, "term encoders": 5.5}),
)
BFLOAT16_TILE = TileCost(
    area_um2=MappingProxyType({"processing elements": 1421579.0}),
    power_mw=MappingProxyType({"processing elements": 475.0}),
)

#: The breakdown that we use for TensorDash, 32-bit floating point, 65 nm. We could not check it in the paper.
TENSORDASH_FP32 = CorePower(
    area_mm2=MappingProxyType(
        {"compute cores": 30.41, "transposers": 0.38, "schedulers and B-side muxes": 0.91, "A-side muxes": 1.73}
    ),
    power_mw=MappingProxyType(
        {"compute cores": 13910.0, "transposers": 47.3, "schedulers and B-side muxes": 102.8, "A-side muxes": 145.3}
    ),
    added=("schedulers and B-side muxes", "A-side muxes"),
)
