"""Layers whose parameters are elsewhere: replicated, swapped, parametrized, sharded, meta."""

import importlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import parametrize

from mmdcn.models import convert_to_deformable
from tests.layers import examples
from tests.layers.test_contract import Halved
from tests.pytorch.models import loss

EVERY = pytest.mark.parametrize("name", examples.NAMES)
AUTOCAST = pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
WITH_PARAMETERS = [name for name in examples.NAMES if [*examples.build(name).parameters()]]


def computed(model: nn.Module, named: dict[str, torch.Tensor], name: str, autocast: bool):
    """Output, and gradients of tensors, by name."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(*examples.inputs(name))
    gradients = torch.autograd.grad(loss(output), [*named.values()]) if named else ()
    return {"output": output.detach(), **dict(zip(named, gradients))}


def assert_same_as_alone(model: nn.Module, parameters, name: str, autocast: bool) -> None:
    alone = examples.build(name)
    expected = computed(alone, dict(alone.named_parameters()), name, autocast)
    actual = computed(model, parameters, name, autocast)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def replicas(model: nn.Module) -> list[nn.Module]:
    """What ``nn.DataParallel`` makes of a model for two devices; here both are the CPU."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_get_device_index", lambda device, optional: device)
        patch.setattr(
            module,
            "_broadcast_coalesced_reshape",
            lambda tensors, devices, detach=False: [[t * 1 for t in tensors] for _ in devices],
        )
        return module.replicate(model, [0, 1])


@EVERY
@AUTOCAST
@pytest.mark.parametrize("parametrized", [False, True], ids=["plain", "parametrized"])
def test_replicas(name, autocast, parametrized):
    model = examples.build(name)
    named = dict(model.named_parameters())
    if parametrized:
        for module in [*model.modules()]:
            if isinstance(getattr(module, "weight", None), torch.Tensor):
                parametrize.register_parametrization(module, "weight", Halved())
        named = {}
    for replica in replicas(model):
        assert not [*replica.parameters()]
        if parametrized and name in WITH_PARAMETERS:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss(replica(*examples.inputs(name))).backward()
            assert all(p.grad.any() for p in model.parameters())
        elif not parametrized:
            assert_same_as_alone(replica, named, name, autocast)


@EVERY
@AUTOCAST
def test_functional_call(name, autocast):
    model = examples.build(name)
    swapped = {key: value.detach().requires_grad_() for key, value in model.named_parameters()}
    model.to("meta")  # so that nothing but what is given can be used

    def call(*values):
        return torch.func.functional_call(model, swapped, values)

    assert_same_as_alone(call, swapped, name, autocast)


@EVERY
@AUTOCAST
def test_meta(name, autocast):
    values = examples.inputs(name)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        shape = examples.build(name)(*values).shape
        model = examples.build(name).to("meta")
        output = model(*(value.to("meta") for value in values))
    assert (output.shape, output.device.type) == (shape, "meta")


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A process group of this process alone."""
    path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(path), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", WITH_PARAMETERS)
@AUTOCAST
def test_one_flat_parameter(name, autocast, group):
    """FSDP's first version: the layer's parameters are views of a tensor that it does not have."""
    model = FullyShardedDataParallel(examples.build(name), device_id=torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(*examples.inputs(name))
        expected = examples.build(name)(*examples.inputs(name))
    assert torch.equal(output, expected)
    loss(output).backward()
    assert all(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    "shard",
    [
        lambda model, group: fully_shard(model, mesh=group),
        lambda model, group: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
        lambda model, group: nn.Sequential(
            FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        ),
    ],
)
def test_sharded_models_are_not_converted(shard, group):
    model = shard(nn.Sequential(nn.Conv2d(4, 4, 3)), group)
    with pytest.raises(ValueError, match=r"got one that is sharded, .*: convert it first"):
        convert_to_deformable(model, dcn=dict(type="DCNv2"), select="*0")


@pytest.mark.parametrize("name", WITH_PARAMETERS)
@AUTOCAST
def test_sharded_parameters(name, autocast, group):
    """FSDP's second version, around the layer and around each of its branches."""
    model = examples.build(name)
    for part in (*model.children(), model):
        fully_shard(part, mesh=group)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(*examples.inputs(name))
        expected = examples.build(name)(*examples.inputs(name))
    assert torch.equal(output, expected)
    loss(output).backward()
    assert all(p.grad.full_tensor().any() for p in model.parameters())
