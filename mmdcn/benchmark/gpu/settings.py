"""What a section is told: device, sizes, and what else is at hand."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..cases import SHAPES, Case

if TYPE_CHECKING:
    import torch

    from mmdcn.timing import Budget


@dataclass(frozen=True)
class Settings:
    """The same in every process of one run.

    Attributes:
        device: ``'cuda'``, or ``'cpu'`` to go through everything without a GPU.
        folder: for the files of sections.
        tests: the folder that has the package `tests`.
        beside: a folder that has another `mmdcn`, to be timed beside this one.
        faults: what is to go wrong, by ``section/case``: ``'crash'``, ``'hang'``, ``'cuda'`` or
            ``'error'``. For tests.
    """

    device: str
    folder: str
    tests: str | None = None
    beside: str | None = None
    faults: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        return cls(**json.loads(text))

    @property
    def target(self) -> torch.device:
        import torch

        return torch.device("cuda", 0) if self.device == "cuda" else torch.device("cpu")

    @property
    def tiny(self) -> bool:
        """Whether the figures mean nothing."""
        return self.device == "cpu"

    @property
    def budget(self) -> Budget:
        """Of samples for a call."""
        from mmdcn.timing import Budget

        if self.tiny:
            return Budget(seconds=0.0, fewest=1, most=1)
        return Budget(seconds=0.05, fewest=7, most=21)

    @property
    def shapes(self) -> tuple[Case, ...]:
        """The 3×3 convolutions of R-50 at 800×1333, c3 to c5."""
        if not self.tiny:
            return SHAPES["r50"]
        return (replace(SHAPES["r50"][1], channels=16, out_channels=8, height=7, width=6),)

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes, those first that say most should the time not suffice for all."""
        return (2,) if self.tiny else (2, 8, 1)

    def file(self, name: str) -> Path:
        return Path(self.folder) / name.replace("/", "_").replace(" ", "_")


def synchronise(device: torch.device) -> None:
    """Wait for the device, which then reports what went wrong on it."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
