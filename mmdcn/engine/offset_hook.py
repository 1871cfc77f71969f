"""Statistics of offsets, logged while a model trains, and a warning where they run away."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook, LoggerHook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmdcn.engine.sampled_calls import named_calls
from mmdcn.layers._checks import NamedArguments
from mmdcn.ops._observers import SampledCall

__all__ = ["OffsetStatisticsHook"]


class OffsetStatisticsHook(NamedArguments, Hook):
    """A hook that logs how far deformable layers move their samples, and warns of runaway offsets.

    For each layer, or module that computes its own offsets: the mean and the largest offset of a
    coordinate, in magnitude and in pixels of the layer's input, and the share of samples that
    offsets take out of that input, of those that the regular kernel takes inside. They go to the
    log and, as ``offsets/<layer>/mean``, ``…/largest`` and ``…/outside``, to all of the
    visualizer's backends. They are of the iteration itself, which costs no forward pass.

    A sample outside gives nothing and passes no gradient: offsets that have run away do not come
    back by training. The first time that a layer has more than `max_outside` of its samples there,
    or offsets that are not finite, one warning names it and what to do.

    Args:
        interval: iterations between two logs; None for those in which mmengine's ``LoggerHook``
            logs.
        max_outside: the share of samples outside, from 0 to 1, beyond which it warns.

    Raises:
        TypeError: there is no such argument.
        ValueError: an argument is out of range.
    """

    priority = "VERY_LOW"

    def __init__(self, interval: int | None = None, max_outside: float = 0.5) -> None:
        if interval is not None and (not isinstance(interval, int) or interval < 1):
            raise ValueError(f"interval: expected None or an int of at least 1, got {interval!r}")
        if not isinstance(max_outside, int | float) or not 0 <= max_outside <= 1:
            raise ValueError(f"max_outside: expected a number from 0 to 1, got {max_outside!r}")
        self.interval = interval
        self.max_outside = max_outside
        self._recording: ExitStack | None = None
        self._sums: dict[str, Tensor] = {}
        self._warned = self._told_of_none = False

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Begin to record, if this iteration will be logged."""
        if not is_main_process() or not self._is_due(runner, batch_idx):
            return
        self._stop()
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._recording = ExitStack()
        self._recording.enter_context(named_calls(model, self._add))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Log what was recorded."""
        if self._recording is None:
            return
        sums = self._sums
        self._stop()
        if not sums:
            if not self._told_of_none:
                runner.logger.info(
                    "No offsets to log: the model called no deformable convolution (or is compiled,"
                    " and its calls are not seen)."
                )
                self._told_of_none = True
            return
        statistics = {name: offset_statistics(*values.tolist()) for name, values in sums.items()}
        lines = [
            f"  {name}: {mean:.3g}, {largest:.3g}, {outside:.1%}"
            for name, (mean, largest, outside) in statistics.items()
        ]
        runner.logger.info(
            "Offsets in pixels of each layer's input, mean and largest, and samples that they take "
            "outside:\n" + "\n".join(lines)
        )
        scalars = {
            f"offsets/{name}/{kind}": value
            for name, values in statistics.items()
            for kind, value in zip(("mean", "largest", "outside"), values)
        }
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)
        self._warn(runner, statistics)

    def after_train(self, runner: Runner) -> None:
        """Stop recording where an iteration was given up."""
        self._stop()

    def _is_due(self, runner: Runner, batch_idx: int) -> bool:
        if self.interval is not None:
            return self.every_n_inner_iters(batch_idx, self.interval)
        hooks = [hook for hook in runner.hooks if isinstance(hook, LoggerHook)]
        logger = hooks[0] if hooks else LoggerHook()
        if self.every_n_inner_iters(batch_idx, logger.interval):
            return True
        # The end of an epoch is logged too, on the logger's own terms.
        few = len(runner.train_dataloader) <= logger.interval
        last = self.end_of_epoch(runner.train_dataloader, batch_idx)
        return last and (not logger.ignore_last or few)

    def _stop(self) -> None:
        if self._recording is not None:
            self._recording.close()
        self._recording = None
        self._sums = {}

    def _add(self, name: str, module: nn.Module, describe: Callable[[], SampledCall]) -> None:
        layer = name.partition("#")[0] or type(module).__name__
        values = offset_sums(describe())
        self._sums[layer] = add_offset_sums(self._sums.get(layer), values)

    def _warn(self, runner: Runner, statistics: dict[str, tuple[float, float, float]]) -> None:
        away = {
            name: outside
            for name, (mean, _, outside) in statistics.items()
            if outside > self.max_outside or not math.isfinite(mean)
        }
        if self._warned or not away:
            return
        self._warned = True
        worst = max(away, key=away.__getitem__)
        more = f" (and in {len(away) - 1} more layers of the list above)" if len(away) > 1 else ""
        runner.logger.warning(
            f"Offsets have run away in {worst}{more}: they take {away[worst]:.0%} of its samples "
            "outside its input, where samples give nothing and pass no gradient, so that training "
            "alone does not bring them back. Go back to a checkpoint from before, and lower the "
            "learning rate of offsets (optim_wrapper.paramwise_cfg=dict(dcn_offset_lr_mult=0.1)), "
            "clip gradients (optim_wrapper.clip_grad=dict(max_norm=10)), or bound the offsets "
            "(max_offset=8 in the layer's dcn or conv_cfg, in pixels of its input)."
        )


@torch.no_grad()
def offset_sums(call: SampledCall) -> Tensor:
    """The largest offset, and sums: offsets, their number, samples taken outside, samples."""
    moved = (call.locations - call.regular).abs()
    size = call.regular.new_tensor(call.size).view(-1, *[1] * len(call.size))

    def inside(points: Tensor) -> Tensor:
        axis = points.dim() - len(call.size) - 1
        return ((points > -1) & (points < size)).all(dim=axis)

    here = inside(call.regular)  # (K, *out)
    outside = here & ~inside(call.locations)
    largest = moved.amax() if moved.numel() else moved.new_zeros(())
    samples = here.sum() * (call.locations.shape[0] * call.locations.shape[1])
    counts = [moved.sum(), moved.new_tensor(moved.numel()), outside.sum(), samples]
    return torch.stack([value.to(moved.dtype) for value in (largest, *counts)])


def add_offset_sums(former: Tensor | None, found: Tensor) -> Tensor:
    """Sums of :func:`offset_sums` with those of another call, if there was one."""
    if former is None:
        return found
    largest = torch.maximum(former[0], found[0])
    return torch.cat([largest[None], former[1:] + found[1:]])


def offset_statistics(
    largest: float, total: float, number: float, outside: float, samples: float
) -> tuple[float, float, float]:
    """The mean and the largest offset, and the share of samples taken outside, of such sums."""
    return total / max(number, 1), largest, outside / max(samples, 1)
