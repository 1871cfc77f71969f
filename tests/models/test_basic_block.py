"""ResNet-18 and ResNet-34 with ``dcn=``, and what mmdet has given back."""

import sys

import pytest
import torch

pytest.importorskip("mmdet")

from mmdet.models import ResNet
from mmdet.models.backbones.resnet import BasicBlock
from mmdet.registry import MODELS

from mmdcn import layers, plugin
from mmdcn.models import basic_block
from tests.kernel_calls import KernelCalls
from tests.programs import run_python

PACKS = {"DCN": layers.DeformConv2dPack, "DCNv2": layers.ModulatedDeformConv2dPack}


@pytest.fixture(autouse=True)
def installed():
    plugin.install()
    yield
    plugin.install()


def backbone(depth=18, **arguments):
    arguments.setdefault("dcn", dict(type="DCN", deform_groups=2, fallback_on_stride=False))
    return MODELS.build(
        dict(
            type="mmdet.ResNet",
            depth=depth,
            base_channels=8,
            zero_init_residual=False,
            stage_with_dcn=(False, True, True, True),
            **arguments,
        )
    )


@pytest.mark.parametrize(("depth", "blocks"), [(18, (2, 2, 2, 2)), (34, (3, 4, 6, 3))])
@pytest.mark.parametrize("name", PACKS)
def test_the_second_convolution_of_each_block_is_deformable(name, depth, blocks):
    model = backbone(depth, dcn=dict(type=name, deform_groups=2, fallback_on_stride=False))
    found = {n: m for n, m in model.named_modules() if isinstance(m, PACKS[name])}
    assert [*found] == [
        f"layer{stage}.{block}.conv2" for stage in (2, 3, 4) for block in range(blocks[stage - 1])
    ]
    assert all(layer.deform_groups == 2 for layer in found.values())
    assert not any(layer.bias for layer in found.values())

    model.init_weights()
    assert not any(p.any() for layer in found.values() for p in layer.conv_offset.parameters())
    with KernelCalls() as calls:
        outputs = model(torch.randn(2, 3, 64, 64))
        sum(output.square().mean() for output in outputs).backward()
    assert (calls.forward, calls.backward, calls.mmcv) == (len(found), len(found), 0)
    assert [tuple(output.shape[1:]) for output in outputs] == [
        (8, 16, 16),
        (16, 8, 8),
        (32, 4, 4),
        (64, 2, 2),
    ]
    for layer in found.values():
        assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


def test_a_plain_checkpoint_gives_the_plain_output():
    plain, deformable = backbone(dcn=None), backbone()
    plain.eval(), deformable.eval()
    missing, unexpected = deformable.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(".conv2.conv_offset." in key for key in missing)
    x = torch.randn(1, 3, 64, 64)
    for mine, expected in zip(deformable(x), plain(x)):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_the_block_takes_what_mmdets_takes():
    block = BasicBlock(8, 8, 2, 1, None, "pytorch", False, None, dict(type="BN"), dict(type="DCN"))
    assert isinstance(block.conv2, layers.DeformConv2dPack)
    assert type(BasicBlock(8, 8).conv2) is torch.nn.Conv2d
    with pytest.raises(TypeError, match="unexpected keyword argument 'dnc'"):
        BasicBlock(8, 8, dnc=dict(type="DCN"))
    with pytest.raises(ValueError, match="conv_cfg: expected None beside dcn"):
        BasicBlock(8, 8, conv_cfg=dict(type="Conv2d"), dcn=dict(type="DCN"))


def test_uninstalling_gives_the_block_back():
    ours = BasicBlock.__init__
    plugin.uninstall()
    assert not plugin.report().basic_block_takes_dcn
    assert "ResNet-18 and ResNet-34 refuse dcn" in str(plugin.report())
    with pytest.raises(AssertionError, match="Not implemented yet"):
        backbone()
    theirs = BasicBlock.__init__
    plugin.install()
    plugin.install()
    assert BasicBlock.__init__.__wrapped__ is theirs
    assert BasicBlock.__init__ is not ours
    assert plugin.report().basic_block_takes_dcn
    assert ResNet.arch_settings[18][0] is BasicBlock
    plugin.uninstall()
    assert BasicBlock.__init__ is theirs
    assert basic_block._FINDER not in sys.meta_path


def test_mmdet_may_be_imported_after_the_plugin():
    code = """
import sys
import mmdcn
assert not any(name.partition(".")[0] == "mmdet" for name in sys.modules)
assert mmdcn.plugin.report().basic_block_takes_dcn
from mmdet.models.backbones.resnet import BasicBlock
assert mmdcn.plugin.report().basic_block_takes_dcn
BasicBlock(4, 4, dcn=dict(type="DCN"))
"""
    run_python("-c", code)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("ResNet", dict(depth=18)),
        ("ResNet", dict(depth=50, stage_with_dcn=(False,) * 4)),
        ("ResNeXt", dict(depth=50)),
        ("RegNet", dict(arch="regnetx_400mf")),
    ],
)
def test_a_backbone_without_a_deformable_stage_says_so(kind, arguments, caplog):
    arguments = dict(type=f"mmdet.{kind}", base_channels=8, **arguments)
    if kind == "RegNet":
        del arguments["base_channels"]
    with caplog.at_level("WARNING", "mmdcn"):
        MODELS.build(dict(arguments, dcn=dict(type="DCN")))
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{kind}: dcn={{'type': 'DCN'}} is in no stage")
    assert "set stage_with_dcn=(False, True, True, True)" in record.getMessage()
    caplog.clear()
    with caplog.at_level("WARNING", "mmdcn"):
        MODELS.build(arguments)
        MODELS.build({**arguments, "dcn": dict(type="DCN"), "stage_with_dcn": (True,) * 4})
    assert not caplog.records
