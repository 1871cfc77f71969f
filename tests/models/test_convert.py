"""Converted models start as the plain ones, however their weights come, and learn from there."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")

import mmcv.cnn
from mmdet.registry import MODELS
from mmengine.registry import MODELS as RootMODELS
from mmengine.registry import DefaultScope

from mmdcn import layers
from mmdcn.models import convert_to_deformable
from tests.kernel_calls import KernelCalls
from tests.models.converted import assert_same_output, converted, image, levels, tensors

pytestmark = pytest.mark.usefixtures("plugin_in_mmdet")


# What it is, its input, which convolutions are chosen, and how many these are.
MODEL_CONFIGS = {
    "ResNet-18": (
        dict(type="ResNet", depth=18, base_channels=8, zero_init_residual=False),
        image,
        ["layer[34].*.conv[12]", "layer2.1.conv2"],
        9,
    ),
    "RegNet": (
        dict(
            type="RegNet",
            arch=dict(w0=8, wa=8.0, wm=2.0, group_w=8, depth=8, bot_mul=1.0),
            stem_channels=8,
            zero_init_residual=False,
        ),
        image,
        "layer[34].*.conv2",
        6,
    ),
    "Swin": (
        dict(
            type="SwinTransformer",
            embed_dims=16,
            depths=(1, 1, 1, 1),
            num_heads=(1, 1, 1, 1),
        ),
        image,
        "patch_embed.projection",
        1,
    ),
    "FPN": (
        dict(type="FPN", in_channels=[16, 16], out_channels=16, num_outs=3),
        levels,
        lambda name, _: name.startswith("fpn_convs") and name.endswith(".conv"),
        2,
    ),
    "RPN head": (
        dict(type="RPNHead", in_channels=16, feat_channels=16),
        levels,
        "rpn_conv",
        1,
    ),
}


@pytest.mark.parametrize("dcn", ["DCN", "DCNv2"])
@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_starts_as_the_plain_model_and_learns_offsets(name, dcn):
    config, inputs, select, count = MODEL_CONFIGS[name]
    plain = MODELS.build(config)
    plain.eval()
    model = copy.deepcopy(plain)
    parameters = dict(model.named_parameters())
    assert convert_to_deformable(model, dict(type=dcn), select) is model

    found = converted(model)
    assert len(found) == count
    added = {f"{layer}.conv_offset.{name}" for layer in found for name in ("weight", "bias")}
    assert set(model.state_dict()) - set(plain.state_dict()) == added
    assert [key for key in model.state_dict() if key not in added] == [*plain.state_dict()]
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())
    assert not any(layer.training for layer in found.values())

    x = inputs()
    with KernelCalls() as calls:
        outputs = tensors(model(x))
        sum(output.square().mean() for output in outputs).backward()
    calls_per_pass = count * (len(x) if name == "RPN head" else 1)
    assert (calls.forward, calls.mmcv) == (calls_per_pass, 0)
    for mine, expected in zip(outputs, tensors(plain(x)), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    for layer in found.values():
        assert all(p.grad.isfinite().all() for p in layer.parameters())
        # A patch of the patch embedding is a tap per pixel, and all of them have a gradient.
        assert layer.conv_offset.bias.grad.any()


@pytest.mark.parametrize("dcn", ["DCN", "DCNv2"])
@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_is_initialised_as_the_plain_model(name, dcn):
    """Of the same seed, by whatever rule: several of these match layers by class name."""
    config, inputs, select, count = MODEL_CONFIGS[name]
    models = []
    for convert in (False, True):
        torch.manual_seed(1)
        model = MODELS.build(config)
        if convert:
            convert_to_deformable(model, dict(type=dcn), select)
        model.init_weights()
        model.eval()
        models.append(model)
    assert len(converted(models[1])) == count
    assert_same_output(models[1], models[0], inputs())


def fpn(**arguments):
    config = dict(type="FPN", in_channels=[16, 16], out_channels=16, num_outs=2)
    return MODELS.build(config | arguments)


def test_pretrained_weights_may_come_after(tmp_path):
    plain = fpn().eval()
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.pth")
    model = fpn(init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "plain.pth"))).eval()
    convert_to_deformable(model, dict(type="DCNv2"), "fpn_convs.*.conv")
    x = levels()
    assert not torch.equal(model(x)[0], plain(x)[0])
    model.init_weights()
    assert_same_output(model, plain, x)

    other = convert_to_deformable(fpn().eval(), dict(type="DCNv2"), "*_convs.*.conv")
    missing, unexpected = other.load_state_dict(plain.state_dict(), strict=False)
    assert len(missing) == 8
    assert not unexpected
    assert_same_output(other, plain, x)


def test_a_pretrained_converted_model_keeps_its_offsets(tmp_path):
    """Its branches' keys are loaded while init_weights sees the plain convolutions."""
    trained = convert_to_deformable(fpn().eval(), dict(type="DCNv2"), "fpn_convs.*.conv")
    for layer in converted(trained).values():
        nn.init.normal_(layer.conv_offset.weight)
    state = trained.state_dict()
    for old, new in (
        ("", ""),
        ("conv.conv_offset", "conv_offset"),
        ("conv_offset", "conv_offset_mask"),
    ):
        renamed = {key.replace(old, new): value for key, value in state.items()}
        torch.save({"state_dict": renamed}, tmp_path / "trained.pth")
        init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "trained.pth"))
        model = convert_to_deformable(
            fpn(init_cfg=init_cfg).eval(), dict(type="DCNv2"), "fpn_convs.*.conv"
        )
        model.init_weights()
        assert_same_output(model, trained, levels())
        assert not model.init_weights.places[0].conv._load_state_dict_pre_hooks


def test_converting_twice_copying_and_pickling():
    torch.manual_seed(1)
    plain = fpn()
    plain.init_weights()
    torch.manual_seed(1)
    model = fpn()
    convert_to_deformable(model, dict(type="DCN"), "fpn_convs.0.conv")
    convert_to_deformable(model, dict(type="DCNv2", deform_groups=4), "lateral_convs.*.conv")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    state = torch.get_rng_state()
    for one in (*copies, model):
        torch.set_rng_state(state)
        before = {name: p.detach().clone() for name, p in one.named_parameters()}
        one.init_weights()
        # What is initialised is the copy itself.
        assert all(name in one.state_dict() for name in model.state_dict())
        assert not torch.equal(before["fpn_convs.0.conv.weight"], one.fpn_convs[0].conv.weight)
        assert [type(layer).__name__ for layer in converted(one).values()] == [
            "ModulatedDeformConv2dPack",
            "ModulatedDeformConv2dPack",
            "DeformConv2dPack",
        ]
        assert_same_output(one, plain, levels())


def test_a_shared_convolution_stays_shared():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv, nn.ModuleDict({"again": conv}))
    convert_to_deformable(model, dict(type="DCN"), "2")
    assert isinstance(model[0], layers.DeformConv2dPack)
    assert model[0] is model[2] is model[3]["again"]


@pytest.mark.parametrize(
    ("conv", "padding"),
    [
        (nn.Conv2d(4, 6, (3, 1), (2, 1), (1, 0), (2, 1), groups=2, bias=False), (1, 0)),
        (nn.Conv2d(4, 6, 3, padding="valid"), (0, 0)),
        (nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(2, 1)), (2, 2)),
        (mmcv.cnn.bricks.wrappers.Conv2d(4, 4, 1), (0, 0)),
    ],
)
def test_geometry_and_dtype_carry_over(conv, padding):
    plain = nn.Sequential(conv).double()
    model = convert_to_deformable(
        copy.deepcopy(plain), dict(type="DCNv2", deform_groups=2), select=["0"]
    )
    layer = model[0]
    assert layer.padding == padding
    assert layer.conv_offset.weight.dtype == torch.float64
    x = torch.randn(2, 4, 9, 11).double()
    torch.testing.assert_close(model(x), plain(x))


def test_a_wrapped_model_is_refused():
    model = nn.DataParallel(nn.Sequential(nn.Conv2d(4, 4, 3)))
    with pytest.raises(ValueError, match="expected the model itself, got a DataParallel"):
        convert_to_deformable(model, dict(type="DCN"), "module.0")


def test_random_numbers_are_left_alone():
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    state = torch.get_rng_state()
    convert_to_deformable(model, dict(type="DCNv2"), "0")
    assert torch.equal(torch.get_rng_state(), state)


def test_fallback_on_stride():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(4, 4, 3))
    dcn = dict(type="DCN", fallback_on_stride=True)
    convert_to_deformable(model, dcn, "*")
    assert [*converted(model)] == ["1"]
    with pytest.raises(ValueError, match="a convolution of stride 1 among those chosen"):
        convert_to_deformable(nn.Sequential(nn.Conv2d(4, 4, 3, stride=2)), dcn, "0")


@pytest.mark.parametrize("select", ["*", "", lambda name, module: True])
def test_a_convolution_that_is_the_model_itself(select):
    conv = nn.Conv2d(4, 6, 3, padding=1)
    layer = convert_to_deformable(conv, dict(type="DCNv2"), select)
    assert isinstance(layer, layers.ModulatedDeformConv2dPack)
    assert layer.weight is conv.weight
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(layer(x), conv(x))
    for refused, pattern, message in (
        (nn.Conv2d(4, 4, 3), "conv", r"such as '\*', as the model is one itself, got 'conv'"),
        (nn.Conv3d(4, 4, 3), "*", "got the model itself, a Conv3d"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_to_deformable(refused, dict(type="DCN"), pattern)


def test_a_function_chooses_by_name_and_module():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3))
    convert_to_deformable(
        model, dict(type="DCN"), lambda _, m: isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    )
    assert [*converted(model)] == ["2"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_branch_has_the_memory_format_of_the_weight(memory_format):
    model = nn.Sequential(nn.Conv2d(4, 4, 3)).to(memory_format=memory_format)
    layer = convert_to_deformable(model, dict(type="DCNv2"), "0")[0]
    for weight in (layer.weight, layer.conv_offset.weight):
        assert weight.is_contiguous(memory_format=memory_format)
    assert not layer.conv_offset.weight.any()


@pytest.mark.parametrize("type_of_layer", ["DCNv2", "mmdcn.DCNv2", "OwnPack"])
def test_model_type_is_looked_up_in_the_scope_that_builds(type_of_layer, monkeypatch):
    class OwnPack(layers.ModulatedDeformConv2dPack):
        pass

    monkeypatch.setitem(MODELS.module_dict, "OwnPack", OwnPack)
    plain = dict(type="ResNet", depth=18, base_channels=8)
    config = plain | dict(
        type="mmdcn.Deformable",
        model_type="ResNet",
        convert=dict(dcn=dict(type=type_of_layer), select="layer4.*.conv2"),
    )
    monkeypatch.setattr(DefaultScope, "get_current_instance", classmethod(lambda cls: None))
    monkeypatch.setattr(DefaultScope, "overwrite_default_scope", lambda scope: nullcontext())
    assert len(converted(MODELS.build(config))) == 2
    with pytest.raises(KeyError, match="ResNet is not in the mmengine::model registry"):
        RootMODELS.build(config)
    with pytest.raises(KeyError, match="ResNet is not in the mmengine::model registry"):
        RootMODELS.build(plain)
