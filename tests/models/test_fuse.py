"""Batch normalisations folded into deformable layers: the same output, whatever stands before."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import weight_norm

from mmdcn import layers
from mmdcn.models import fuse_conv_bn
from tests.layers import examples

CONVOLUTIONS = [name for name in examples.NAMES if "RoIPool" not in name]
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def trained(norm: nn.Module) -> nn.Module:
    """A normalisation whose statistics and affine are those of none."""
    for value in (norm.weight, norm.bias, norm.running_mean):
        if value is not None:
            nn.init.normal_(value)
    if norm.running_var is not None:
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm.eval()


class Normalised(nn.Module):
    """A layer that may take offsets, and the normalisation after it."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, *inputs):
        return self.norm(self.layer(*inputs))


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def assert_folds(model: nn.Module, *inputs: torch.Tensor, left: int = 0) -> None:
    model.eval()
    kinds = {type(m) for m in model.modules()}
    with torch.no_grad():
        expected = model(*inputs)
        assert fuse_conv_bn(model) is model
        torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-4)
    assert len(norms_of(model)) == left
    assert {type(m) for m in model.modules()} <= kinds | {nn.Identity}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_layer(name, affine):
    norm = trained(NORMS[examples.rank_of(name)](12, affine=affine))
    assert_folds(Normalised(examples.build(name), norm), *examples.inputs(name))


@pytest.mark.parametrize("name", ["DeformConv2dPack", "DCNv3"])
@pytest.mark.parametrize("bias", [True, False])
def test_between_other_layers(name, bias):
    layer = getattr(layers, name)(8, 8, 3, padding=1, bias=bias)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), layer, trained(nn.BatchNorm2d(8)), nn.ReLU(), nn.Conv2d(8, 8, 1)
    )
    assert_folds(model, torch.randn(2, 3, 9, 11))
    assert model[1] is layer


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_plain_convolutions_fold_as_ever(norm):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), trained(nn.BatchNorm2d(8)))
    assert_folds(model, torch.randn(2, 3, 9, 11))
    assert isinstance(fuse_conv_bn(nn.Sequential(nn.Conv2d(3, 8, 3), norm(8)))[1], nn.Identity)


DCN = layers.DeformConv2dPack


@pytest.mark.parametrize(
    "between",
    [
        lambda: nn.ConvTranspose2d(8, 8, 3),
        lambda: nn.ReLU(),
        lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()),
        lambda: layers.DCNv4(8, 8, 3, without_pointwise=True),
        lambda: weight_norm(nn.Conv2d(8, 8, 1)),
        lambda: nn.utils.spectral_norm(nn.Conv2d(8, 8, 1)),
    ],
    ids=["transposed", "activation", "block", "without weight", "parametrized", "spectral"],
)
@pytest.mark.parametrize("first", [nn.Conv2d, DCN])
def test_never_into_another_layer(first, between):
    model = nn.Sequential(first(3, 8, 3), between(), trained(nn.BatchNorm2d(8)))
    assert_folds(model, torch.randn(2, 3, 12, 12), left=1)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"^module: expected an nn.Module, got a str"):
        fuse_conv_bn("model.pth")


def test_without_statistics_it_stays():
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    assert_folds(nn.Sequential(DCN(3, 8, 3), norm), torch.randn(2, 3, 9, 9), left=1)


def test_a_shared_layer_is_folded_for_each_normalisation():
    shared = DCN(8, 8, 3, padding=1)
    model = nn.Sequential(
        nn.Sequential(shared, trained(nn.BatchNorm2d(8))),
        nn.Sequential(shared, trained(nn.BatchNorm2d(8))),
        shared,
    )
    assert_folds(model, torch.randn(2, 8, 9, 9))
    assert model[2] is shared


@pytest.mark.parametrize("name", ["DeformConv2dPack", "ModulatedDeformConv3dPack"])
def test_torchs_own_function_folds_too(name):
    layer = examples.build(name).eval()
    norm = trained(NORMS[examples.rank_of(name)](12))
    (x,) = examples.inputs(name)
    torch.testing.assert_close(
        fuse_conv_bn_eval(layer, norm)(x), norm(layer(x)), rtol=1e-4, atol=1e-4
    )


# ------------------------------------------------------------------------------------ the toolbox's


@pytest.fixture
def mmcv_cnn():
    pytest.importorskip("mmcv.ops")
    import mmcv.cnn

    from mmdcn import plugin

    plugin.install()
    yield mmcv.cnn
    plugin.install()


@pytest.mark.parametrize("conv", ["Conv2d", "DCN", "DCNv2", "DCNv3"])
@pytest.mark.parametrize(
    "order", ["conv norm act", "act conv norm", "norm conv act", "norm act conv", "conv act norm"]
)
def test_conv_module(mmcv_cnn, conv, order):
    module = mmcv_cnn.ConvModule(
        8,
        8,
        3,
        padding=1,
        conv_cfg=dict(type=conv),
        norm_cfg=dict(type="BN"),
        order=(*order.split(),),
    )
    trained(module.norm)
    assert_folds(module, torch.randn(2, 8, 9, 9), left=int("conv norm" not in order))


@pytest.mark.parametrize("name", ["DeformConv2dPack", "ModulatedDeformConv2dPack"])
def test_mmcvs_own_layers(mmcv_cnn, name):
    import mmcv.ops

    layer = getattr(mmcv.ops, name)(8, 8, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), layer, trained(nn.BatchNorm2d(8)))
    # mmcv's v1 has no bias to fold into.
    assert_folds(model, torch.randn(2, 8, 9, 9), left=int(name == "DeformConv2dPack"))


@pytest.mark.parametrize("name", ["DCN", "DCNv2", "DCNv3", "DCNv4"])
def test_a_backbone(mmcv_cnn, name):
    registry = pytest.importorskip("mmdet.registry").MODELS
    model = registry.build(
        dict(
            type="mmdet.ResNet",
            depth=18,
            base_channels=8,
            stem_channels=8,
            dcn=dict(type=name, deform_groups=2),
            stage_with_dcn=(False, True, True, True),
        )
    )
    for norm in norms_of(model):
        trained(norm)
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    expected = [level.detach() for level in model(x)]
    mmcv_cnn.fuse_conv_bn(model)
    assert not norms_of(model)
    for level, value in zip(model(x), expected, strict=True):
        assert (level - value).norm() < 1e-4 * value.norm()


def test_the_plugin_replaces_mmcvs_function_and_gives_it_back(mmcv_cnn):
    from mmdcn import functions, plugin

    benchmark = pytest.importorskip("mmdet.utils.benchmark")
    assert mmcv_cnn.fuse_conv_bn is benchmark.fuse_conv_bn is functions.fuse_conv_bn
    places = plugin.report().functions["mmcv.cnn.fuse_conv_bn"]
    assert {"mmcv.cnn.fuse_conv_bn", "mmdet.utils.benchmark.fuse_conv_bn"} <= {*places}
    plugin.uninstall()
    assert mmcv_cnn.fuse_conv_bn is benchmark.fuse_conv_bn is not functions.fuse_conv_bn
    assert inspect.getmodule(mmcv_cnn.fuse_conv_bn).__name__ == "mmcv.cnn.utils.fuse_conv_bn"
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), trained(nn.BatchNorm2d(8)))
    x = torch.randn(1, 3, 9, 9)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(mmcv_cnn.fuse_conv_bn(model)(x), expected)
