"""Cost of the arms: parameters, operations, and the time of training and of inference."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmdcn import machine, timing

from .nets import ARMS, DigitNet, each_convolution
from .runner import one_thread
from .training import BATCH
from .transforms import CANVAS

VERSION = 1
#: The file of the costs, beside the runs.
FILE = "cost.json"
MMCV = "dcnv2 by mmcv"


def settings() -> dict:
    """All that the result follows from, apart from versions and machine."""
    return {"version": VERSION, "batch": BATCH, "arms": list(ARMS)}


def measure(seconds: float = 1.0) -> dict:
    """Measure all arms in turns, with one thread and batches as in training.

    Args:
        seconds: of samples for each arm, of training and of inference.

    Returns:
        For each arm ``parameters``, ``multiply_adds`` of one image, and the milliseconds of one
        image in training and at inference: quartiles, with the median. Where mmcv is installed,
        training of DCNv2 with its operator too, and how many times ours that is.
    """
    images = torch.rand(BATCH, 1, CANVAS, CANVAS, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(BATCH) % 10
    networks: dict[str, nn.Module] = {}
    for name, arm in ARMS.items():
        if name != "norm":  # that is the plain network
            torch.manual_seed(0)
            networks[name] = arm.build()
    for network in networks.values():
        network.to(memory_format=torch.channels_last)
    with one_thread():
        budget = timing.Budget(seconds)
        calls = {name: timing.Call(_step(n, images, labels)) for name, n in networks.items()}
        training = timing.interleave(calls, torch.device("cpu"), budget)
        calls = {name: timing.Call(_inference(n, images)) for name, n in networks.items()}
        inference = timing.interleave(calls, torch.device("cpu"), budget)
        by_mmcv = _dcnv2_by_mmcv(networks["dcnv2"], images, labels, budget)
    arms = {
        name: {
            "parameters": sum(p.numel() for p in network.parameters()),
            "multiply_adds": multiply_adds(network),
            "training_ms": _quartiles(training[name]),
            "inference_ms": _quartiles(inference[name]),
        }
        for name, network in networks.items()
    }
    facts = {"machine": machine.machine(torch.device("cpu")), "versions": machine.versions()}
    return {"run": settings(), "arms": arms, **by_mmcv, **facts}


def multiply_adds(network: nn.Module) -> int:
    """Multiplications of an image's forward pass, each with its addition."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network.eval()(torch.zeros(1, 1, CANVAS, CANVAS))
    return counter.get_total_flops() // 2


def _step(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        network.train()
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def _inference(network: nn.Module, images: Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def infer() -> None:
        network.eval()(images)

    return infer


def _quartiles(samples: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile of what a batch takes, for one of its images."""
    return [round(value / BATCH, 4) for value in statistics.quantiles(samples, n=4)]


def _dcnv2_by_mmcv(ours: nn.Module, images: Tensor, labels: Tensor, budget: timing.Budget) -> dict:
    """The DCNv2 arm's training with mmcv's layer and kernels, timed in turns with ours.

    The plugin, which puts our kernels under mmcv's layers, is off meanwhile.
    """
    try:
        import mmcv.ops

        from mmdcn import plugin
    except ImportError:
        return {}
    plugin.uninstall()
    try:
        layer = mmcv.ops.ModulatedDeformConv2dPack

        def convert(conv: nn.Conv2d) -> nn.Module:
            place = (conv.kernel_size, conv.stride, conv.padding)
            return layer(conv.in_channels, conv.out_channels, *place, bias=False)

        theirs = each_convolution(convert)(DigitNet()).to(memory_format=torch.channels_last)
        calls = {
            name: timing.Call(_step(network, images, labels))
            for name, network in {"dcnv2": ours, MMCV: theirs}.items()
        }
        samples = timing.interleave(calls, torch.device("cpu"), budget)
    finally:
        plugin.install()
    medians = {name: timing.median(values) for name, values in samples.items()}
    return {
        MMCV: _quartiles(samples[MMCV]),
        "mmcv_training_ratio": medians[MMCV] / medians["dcnv2"],
    }
