"""An exported file beside its checkpoint: metrics of both, and images per second."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from mmengine.model import BaseModel

from mmdcn import timing
from mmdcn.markdown import table

__all__ = ["images_per_second", "lines"]


def images_per_second(
    models: Mapping[str, BaseModel], batch: Mapping[str, Any], seconds: float = 5.0
) -> dict[str, float]:
    """How many images each model goes through in a second, in batches like one.

    Args:
        models: by name; each is called on the batch as a test does, in turns with the others.
        batch: what a data loader gives.
        seconds: of samples for each.
    """
    calls = {
        name: timing.Call(functools.partial(_predict, model, batch))
        for name, model in models.items()
    }
    # Of a model on a GPU too: what it predicts is waited for.
    samples = timing.interleave(calls, torch.device("cpu"), timing.Budget(seconds, fewest=3))
    count = len(batch["inputs"])
    return {name: 1000 * count / timing.median(taken) for name, taken in samples.items()}


def _predict(model: BaseModel, batch: Mapping[str, Any]) -> None:
    with torch.no_grad():
        for sample in model.test_step(dict(batch)):
            sample.pred_instances.scores.cpu()


def lines(
    names: tuple[str, str],
    metrics: tuple[Mapping[str, Any], Mapping[str, Any]],
    speeds: Mapping[str, float],
) -> Iterator[str]:
    """A table of what both give, and how far the first is from the second.

    Args:
        names: of both.
        metrics: what the evaluator gives of each.
        speeds: see :func:`images_per_second`.

    Example:
        >>> metrics = {"coco/bbox_mAP": 0.412}, {"coco/bbox_mAP": 0.413}
        >>> for line in lines(("a", "b"), metrics, {"a": 4.0, "b": 2.0}):
        ...     print(line)
        |  | a | b | difference |
        | --- | ---: | ---: | ---: |
        | coco/bbox_mAP | 0.4120 | 0.4130 | -0.0010 |
        | images/s | 4.00 | 2.00 | 2.00× |
    """
    rows = []
    for key, value in metrics[0].items():
        other = metrics[1].get(key)
        if isinstance(value, Real) and isinstance(other, Real):
            rows.append([key, f"{value:.4f}", f"{other:.4f}", f"{value - other:+.4f}"])
    one, two = (speeds[name] for name in names)
    rows.append(["images/s", f"{one:.2f}", f"{two:.2f}", f"{one / two:.2f}×"])
    yield from table(["", *names, "difference"], rows)
