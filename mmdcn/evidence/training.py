"""One run: a network of an arm trained on digits, and tested on transformed ones.

What is random is the same for all arms of a seed: the digits that are held out, the first weights
of what arms have in common, the order of batches, and every transformation. So differences between
arms are taken seed by seed.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdcn.errors import InputError
from mmdcn.files import write

from .digits import FOLDS, Digits
from .nets import ARMS, is_added, is_offset
from .transforms import ALL, KINDS, transform

#: Raised with every change after which results do not compare with former ones.
VERSION = 1

BATCH = 100
LEARNING_RATE = 3e-3
# Adam moves every parameter by the learning rate, however small its gradient.
# Where all that learns is new, it learns at one rate: on one seed, frozen kernels with DCN had
# 72.6 % so on digits with all transformations, and 64.7 % with offsets at a tenth.
OFFSET_LEARNING_RATE = {"scratch": 0.1, "upright": 0.1, "frozen": 1.0}  # times the others'
WEIGHT_DECAY = 0.05
WARM_UP = 0.1  # of all iterations
TRAINED_STRENGTH = 1.0
STRENGTHS = (0.5, 1.0, 1.5)
CURVE = 10  # points of the curve of a run

TRAININGS = {
    "scratch": "trained on transformed digits from scratch",
    "frozen": "trained on upright digits, all kernels frozen, then only what is added trained on "
    "transformed digits",
    "upright": "trained on upright digits",
}

Tell = Callable[[float], None]


@dataclass(frozen=True)
class Run:
    """What is trained.

    Args:
        training: one of :data:`TRAININGS`.
        arm: a name of :data:`~.nets.ARMS`.
        epochs: passes over the digits that are trained on.
        seed: of everything that is random; seeds 0 to 4 hold out other digits.
    """

    training: str
    arm: str
    epochs: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.training}_{self.arm}_{self.epochs}-epochs_seed-{self.seed}"

    @property
    def base(self) -> Run | None:
        """The run whose weights it starts from, if it does."""
        return Run("upright", "plain", self.epochs, self.seed) if self.is_frozen else None

    @property
    def is_frozen(self) -> bool:
        return self.training == "frozen"

    def settings(self) -> dict:
        """All that its result follows from, apart from versions and machine."""
        return {
            **asdict(self),
            "version": VERSION,
            "batch": BATCH,
            "learning_rate": LEARNING_RATE,
            "offset_learning_rate": OFFSET_LEARNING_RATE[self.training],
            "weight_decay": WEIGHT_DECAY,
        }


def train(run: Run, digits: Digits, folder: Path, tell: Tell = lambda part: None) -> dict:
    """Train and test; the weights are kept in the folder, as ``NAME.pt``.

    Args:
        run: what to train.
        digits: all of them.
        folder: where the weights of the run that this one starts from are.
        tell: is told now and then which part of the run is done, from 0 to 1.

    Returns:
        The result, as JSON has it: ``accuracy`` is in percent, by kind and strength.

    Raises:
        InputError: the run that this one starts from has left no weights.
    """
    start = time.perf_counter()
    seen, held_out = digits.fold(run.seed)
    network = build(run, folder).to(memory_format=torch.channels_last)
    learned = [p for p in network.parameters() if p.requires_grad]
    curve = []
    steps = run.epochs * (len(seen.labels) // BATCH)
    optimizer, schedule = _optimizer(network, run, steps) if learned else (None, None)
    generator = torch.Generator().manual_seed(1000 + run.seed)
    strength = 0.0 if run.training == "upright" else TRAINED_STRENGTH
    for epoch in range(1, run.epochs + 1):
        network.train()
        losses = []
        for images, labels in _batches(seen, strength, generator):
            with torch.set_grad_enabled(bool(learned)):
                loss = F.cross_entropy(network(images), labels)
            if learned:
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(learned, 10.0)
                optimizer.step()
                schedule.step()
            losses.append(loss.item())
        if epoch * CURVE % run.epochs < CURVE or epoch == run.epochs:
            point = {"epoch": epoch, "loss": round(sum(losses) / len(losses), 4)}
            curve.append({**point, ALL: accuracy(network, held_out, ALL, 1.0, run.seed)})
        tell(0.95 * epoch / run.epochs)
    seconds = time.perf_counter() - start
    result = {
        "run": run.settings(),
        "parameters": sum(p.numel() for p in network.parameters()),
        "learned_parameters": sum(p.numel() for p in learned),
        "accuracy": test(network, held_out, run.seed),
        "curve": curve,
        "training_seconds": round(seconds, 1),
    }
    save_weights(network, weights_file(run, folder))
    tell(1.0)
    return result


def build(run: Run, folder: Path) -> nn.Module:
    """The network of a run as its training begins.

    Raises:
        InputError: see :func:`train`.
    """
    arm = ARMS[run.arm]
    torch.manual_seed(run.seed)
    if run.base is None:
        return arm.build()
    network = ARMS[run.base.arm].build()
    network.load_state_dict(read_weights(weights_file(run.base, folder)))
    network.requires_grad_(False)
    torch.manual_seed(100 + run.seed)
    network = arm.convert(network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(is_added(arm, name))
    return network


def trained(run: Run, folder: Path) -> nn.Module:
    """The network of a finished run, for inference.

    Raises:
        InputError: it has left no weights.
    """
    network = ARMS[run.arm].build()
    network.load_state_dict(read_weights(weights_file(run, folder)))
    return network.eval()


def weights_file(run: Run, folder: Path) -> Path:
    return folder / f"{run.name}.pt"


def save_weights(network: nn.Module, path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    write(path, buffer.getvalue())


def read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, weights_only=True)
    except OSError as error:
        raise InputError(f"no weights in {path}: run the arm that made them first") from error


def test(network: nn.Module, held_out: Digits, seed: int) -> dict[str, dict[str, float]]:
    """Accuracies in percent, by kind and strength; upright digits have the strength 0."""
    found = {"upright": {"0": accuracy(network, held_out, ALL, 0.0, seed)}}
    for kind in (*KINDS, ALL):
        found[kind] = {str(s): accuracy(network, held_out, kind, s, seed) for s in STRENGTHS}
    return found


@torch.no_grad()
def accuracy(network: nn.Module, held_out: Digits, kind: str, strength: float, seed: int) -> float:
    """The share of digits, in percent, that a network names right."""
    network.eval()
    generator = torch.Generator().manual_seed(seed % FOLDS)
    images = transform(held_out.images, kind, strength, generator)
    right = sum(
        (network(part).argmax(1) == labels).sum().item()
        for part, labels in zip(images.split(250), held_out.labels.split(250))
    )
    return round(100 * right / len(held_out.labels), 2)


def _batches(
    seen: Digits, strength: float, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """All digits once, each transformed anew; what is left of the last batch is left out."""
    order = torch.randperm(len(seen.labels), generator=generator)
    for chosen in order.split(BATCH):
        if len(chosen) == BATCH:
            yield transform(seen.images[chosen], ALL, strength, generator), seen.labels[chosen]


def _optimizer(
    network: nn.Module, run: Run, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, offsets at a lower rate; the rates warm up, and fall to zero by a cosine."""
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    rates = {False: LEARNING_RATE, True: LEARNING_RATE * OFFSET_LEARNING_RATE[run.training]}
    groups = [
        {"params": [p for name, p in named if is_offset(name) == offset], "lr": rate}
        for offset, rate in rates.items()
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True)
    warm_up = max(1, round(WARM_UP * steps))

    def rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
