"""What every reader of a layer's experts is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor

from .published import PublishedExpert, PublishedMatrix

if TYPE_CHECKING:
    from typing_extensions import Self


class Source(ABC):
    """Reads the experts of one layer one by one; open files, to be closed by close() or `with`.

    WeightFileError for whatever is wrong with the files.
    """

    kind: str
    """ "bf16", "int4", "fp8", "gguf" or "mxfp4"."""
    n_experts: int
    """Experts that the files hold for this layer."""
    formats: tuple[str, str]
    """Formats, as in `published`, of gate/up and of down."""

    @abstractmethod
    def read(self, expert: int) -> tuple[PublishedMatrix | None, ...]:
        """gate (None without one), up [inter, hidden] and down [hidden, inter] of one expert, in `formats`."""

    def biases(self, expert: int) -> dict[str, Tensor]:
        """gate_bias, up_bias [inter] and down_bias [hidden] of one expert, fp32; empty if there are none."""
        return {}

    def read_expert(self, expert: int) -> PublishedExpert:
        """All of one expert."""
        return PublishedExpert(self.read(expert), self.biases(expert))

    @abstractmethod
    def close(self) -> None:
        """Closes the files; harmless if repeated."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
