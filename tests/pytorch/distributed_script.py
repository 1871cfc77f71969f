"""Run as ``python -m tests.pytorch.distributed_script ddp|fsdp2``: models in two processes.

A backbone, then every layer.

Compares the loss and the gradients of a training step with those in one process.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.layers import examples
from tests.pytorch.models import assert_same, backbone, gradients, loss

PROCESSES = 2


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for module in model.modules():
        # Each deformable layer is a unit of its own.
        if hasattr(module, "conv_offset") and module is not model:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run_layer(name: str, rank: int, wrapper: str) -> None:
    """One layer by itself, on the same inputs in every process."""
    expected = examples.build(name)
    if not list(expected.parameters()):
        return  # nothing to average, which DistributedDataParallel refuses
    loss(expected(*examples.inputs(name))).backward()
    model = examples.build(name)
    model = wrap(model, wrapper)
    loss(model(*examples.inputs(name))).backward()
    assert_same(full_gradients(model), full_gradients(expected))
    if rank == 0:
        print(f"{name}: same as in one process", flush=True)


def full_gradients(model: nn.Module) -> dict:
    """By the names of the parameters of the module that was wrapped."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            full = grad.full_tensor() if isinstance(grad, DTensor) else grad
            gradients[name.removeprefix("module.")] = full
    return gradients


def run(rank: int, wrapper: str, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=PROCESSES)
    try:
        for name in ("DCN", "DCNv2"):
            torch.manual_seed(0)
            x = torch.randn(PROCESSES, 3, 48, 64)
            expected = gradients(backbone(name, blocks=2), x)

            model = wrap(backbone(name, blocks=2), wrapper)
            loss(model(x[rank : rank + 1])).backward()
            assert_same(full_gradients(model), expected)
            if rank == 0:
                print(f"{name}: same as in one process", flush=True)
        for name in examples.NAMES:
            run_layer(name, rank, wrapper)
        dist.barrier()
        # Threads of gloo's may outlive the process group, and then abort a process that ends.
        os._exit(0)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        arguments = (sys.argv[1], str(Path(folder) / "rendezvous"))
        # They begin with all that this process has imported, and nothing has been computed in it.
        mp.start_processes(run, arguments, nprocs=PROCESSES, start_method="fork")
