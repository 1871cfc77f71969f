"""Digits and results that are made up, for the tests of the evidence."""

import torch

from mmdcn.evidence.digits import SIZE, Digits
from mmdcn.evidence.training import STRENGTHS, Run
from mmdcn.evidence.transforms import ALL, KINDS


def digits(count: int = 250) -> Digits:
    """Blots, each label's in a place of its own."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    images = 0.1 * torch.rand(count, SIZE, SIZE, generator=generator)
    for image, label in zip(images, labels.tolist()):
        image[6 + label : 12 + label, 8 : 10 + label] = 1.0
    return Digits(images, labels)


def result(run: Run, accuracy: float) -> dict:
    """A result of which every accuracy is the same."""
    tests = {"upright": {"0": accuracy}}
    tests |= {kind: {str(s): accuracy for s in STRENGTHS} for kind in (*KINDS, ALL)}
    return {
        "run": run.settings(),
        "parameters": 1000,
        "accuracy": tests,
        "machine": {"cpu": "a processor", "cores": 2},
        "versions": {"torch": "1", "mmdcn": "2", "python": "3"},
    }
