"""The least time that a cell can take on this machine.

floor = max(operations / peak of the data type, bytes of the experts that the batch touches / DRAM read bandwidth)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from bench.limits import Limit

INT8_ACTIVATIONS = frozenset({"AMXINT8", "AMXINT4", "MOE_INT8", "MOE_INT4", "AMXINT8_SFT"})
"""Methods that are held against the int8 peak. All others against bf16, or fp32 where the CPU has nothing for bf16.
AMXINT4_SFT multiplies int8 too, but pays for unpacking: it is held against what its peers of 4 bits are."""
NEVER_AMX = "MOE_"
"""Methods of this prefix are for machines without AMX and do not use it."""


@dataclass(frozen=True)
class Floor:
    ms: float
    bound: str
    """"compute" or "memory"."""
    peak: str
    """The test that gave the peak."""
    gops: float
    gbs: float
    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Operations for each byte read."""
        return self.flops / self.bytes

    def to_json(self) -> dict[str, float | str]:
        return {**asdict(self), "intensity": self.intensity}


def best(limits: Sequence[Limit], *kinds: str, without: str | None = None) -> Limit:
    """The fastest test of these kinds; ValueError if there is none."""
    fitting = [x for x in limits if x.kind in kinds and not (without and x.name.startswith(without))]
    if not fitting:
        raise ValueError(f"limits: no test of kind {' or '.join(kinds)} ran on this machine")
    return max(fitting, key=lambda limit: limit.median)


def peak_for(limits: Sequence[Limit], method: str, *, backward: bool = False) -> Limit:
    """The peak of what `method` multiplies; a backward pass multiplies bf16 whatever the weights are."""
    int8 = method in INT8_ACTIVATIONS and not backward
    kinds = ("int8", "fp32") if int8 else ("bf16", "fp32")
    return best(limits, *kinds, without="amx" if method.startswith(NEVER_AMX) else None)


def floor_of(
    limits: Sequence[Limit], method: str, flops: float, touched_bytes: float, *, backward: bool = False
) -> Floor:
    peak, read = peak_for(limits, method, backward=backward), best(limits, "read")
    compute, memory = flops / peak.median / 1e6, touched_bytes / read.median / 1e6
    bound = "compute" if compute > memory else "memory"
    return Floor(max(compute, memory), bound, peak.name, peak.median, read.median, flops, touched_bytes)


def better_of(before: Sequence[Limit], after: Sequence[Limit]) -> list[Limit]:
    """Of two measurements of the same tests, the faster one each: what else ran on the machine only slows it."""
    fastest = {limit.name: limit for limit in before}
    for limit in after:
        if limit.name not in fastest or limit.median > fastest[limit.name].median:
            fastest[limit.name] = limit
    return list(fastest.values())
