"""What cannot be converted is refused in a sentence, and the model is as it was."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")


from mmdcn import layers, plugin
from mmdcn.models import build_deformable, convert_to_deformable

pytestmark = pytest.mark.usefixtures("plugin_in_mmdet")


class _Standardised(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) / self.weight.std()


def _hooked():
    conv = nn.Conv2d(4, 4, 3)
    conv.register_forward_hook(lambda *_: None)
    return conv


def zoo():
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 4, 3),
            "block": nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
            "transposed": nn.ConvTranspose2d(4, 4, 3),
            "volume": nn.Conv3d(4, 4, 3),
            "reflecting": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            "lopsided": nn.Conv2d(4, 4, 2, padding="same"),
            "standardised": _Standardised(4, 4, 3),
            "lazy": nn.LazyConv2d(4, 3),
            "spectral": nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)),
            "hooked": _hooked(),
            "deformable": layers.DeformConv2dPack(4, 4, 3),
            "parametrized": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
        }
    )


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ("cnov", "such as conv, got 'cnov', which matches nothing"),
        (["conv", "layer4.*"], "got 'layer4.*', which matches nothing"),
        (lambda name, module: False, "a choice among conv, block.0, .* got none"),
        ([], "at least one pattern, got none"),
        ("block", "plain 2-D convolutions, got 'block', a Sequential; inside it are block.0"),
        ("block.*", "plain 2-D convolutions, got 'block.1', a BatchNorm2d"),
        ("transposed", "no transposed convolution, got 'transposed', a ConvTranspose2d"),
        ("volume", "plain 2-D convolutions, got 'volume', a Conv3d"),
        ("reflecting", "padding_mode='zeros', got 'reflecting', with padding_mode='reflect'"),
        (
            "lopsided",
            "'lopsided' cannot become .*padding: expected as much on both sides.*ZeroPad2d",
        ),
        ("standardised", "plain 2-D convolutions, got 'standardised', a _Standardised"),
        ("lazy", "plain 2-D convolutions, got 'lazy', a LazyConv2d.* run the model once"),
        ("hooked", "without hooks, got 'hooked'"),
        ("deformable", "got 'deformable', which is deformable already"),
        ("parametrized", "2-D convolutions, got 'parametrized'.* convert first, parametrize after"),
        ("spectral", "plain 2-D convolutions, got 'spectral'.* convert first, parametrize after"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(select, message):
    model = zoo()
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        convert_to_deformable(model, dict(type="DCNv2"), select)
    assert list(model.modules()) == before


@pytest.mark.parametrize(
    ("dcn", "error", "message"),
    [
        (dict(), ValueError, "expected type='DCN' or 'DCNv2' .* got None"),
        (dict(type="DCNv22"), ValueError, "got 'DCNv22'"),
        (dict(type="ModulatedDeformConv2d"), ValueError, "got 'ModulatedDeformConv2d', which is"),
        (dict(type=nn.Conv2d), ValueError, "got <class"),
        (dict(type=3), TypeError, "expected type to be a name or a class, got 3"),
        (dict(type="DCN", stride=2), ValueError, "expected no stride, which is the convolution's"),
        (dict(type="DCN", deform_groups=3), ValueError, "'conv' cannot become .*deform_groups=3"),
        ("DCNv2", TypeError, r"dcn: expected a layer such as dict\(type='DCNv2'\), got 'DCNv2'"),
        (None, TypeError, "dcn: expected a layer such as .* got None"),
        (
            dict(type="DCNv2", deform_group=2),
            TypeError,
            "'conv' cannot become .*ModulatedDeformConv2dPack: .*'deform_group'.* 'deform_groups'",
        ),
    ],
)
def test_a_layer_that_cannot_be_is_refused(dcn, error, message):
    with pytest.raises(error, match=message):
        convert_to_deformable(zoo(), dcn, "conv")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Conv2d, "model: expected a model, got the class Conv2d: make an instance of it first"),
        (dict(type="FPN"), "model: expected an nn.Module, got a dict"),
    ],
)
def test_what_is_no_model_is_refused(model, message):
    with pytest.raises(TypeError, match=message):
        convert_to_deformable(model, dict(type="DCN"), "*")


@pytest.mark.parametrize("select", [None, 3, ["conv", 3]])
def test_a_select_of_another_type_is_refused(select):
    with pytest.raises(TypeError, match="select: expected a pattern, a sequence of patterns or"):
        convert_to_deformable(zoo(), dict(type="DCN"), select)


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (nn.Conv2d, "got the class Conv2d: choose by lambda name, module"),
        (nn.Conv2d(3, 3, 1), "got a module: choose by lambda name, module"),
        (lambda name: True, r"a function of a name and its module, .* got one of \(name\)"),
        ({"conv"}, "got {'conv'}"),
    ],
)
def test_a_select_of_another_kind_is_refused(select, message):
    with pytest.raises(TypeError, match=f"^select: expected .*{message}"):
        convert_to_deformable(zoo(), dict(type="DCN"), select)


@pytest.mark.parametrize("value", ["no", 1, None])
def test_train_offsets_is_true_or_false(value):
    model = zoo()
    with pytest.raises(TypeError, match=r"^train_offsets: expected True or False, got"):
        convert_to_deformable(model, dict(type="DCN"), "conv", train_offsets=value)
    assert type(model.conv) is nn.Conv2d
    dcn = dict(type="DCN", fallback_on_stride=value)
    with pytest.raises(TypeError, match=r"^dcn: expected fallback_on_stride to be True or False"):
        convert_to_deformable(model, dcn, "conv")


def test_convolutions_of_which_something_would_be_lost():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3, dtype=torch.complex64))
    model[0].forward = lambda x: x
    with pytest.raises(ValueError, match="whose own forward was set on it"):
        convert_to_deformable(model, dict(type="DCN"), "0")
    with pytest.raises(ValueError, match=r"real weights, got '1', whose are torch.complex64"):
        convert_to_deformable(model, dict(type="DCN"), "1")


@pytest.mark.parametrize(
    ("convert", "error", "message"),
    [
        ([], ValueError, "expected at least one"),
        ("conv", TypeError, "expected dict"),
        (["conv"], TypeError, "expected dict"),
        (dict(dcn=dict(type="DCN"), selct="conv"), TypeError, r"'selct' \(did you mean 'select'"),
        (dict(dcn=dict(type="DCN")), TypeError, "expected select, got none"),
        ([dict(select="conv")], TypeError, "expected dcn, got none"),
    ],
)
def test_conversions_in_a_config(convert, error, message):
    with pytest.raises(error, match=f"^convert: .*{message}"):
        build_deformable("mmdet.ResNet", convert, depth=50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(convert=dict()), "expected model_type, got none"),
        (dict(model_type="FPN"), "expected convert, got none"),
        (dict(model_type="FPN", convrt={}), "convert, got none .is 'convrt' meant to be it"),
    ],
)
def test_what_a_config_has_to_say(arguments, message):
    plugin.install()
    with pytest.raises(TypeError, match=f"^mmdcn.Deformable: .*{message}"):
        plugin.MODELS.build(dict(type="mmdcn.Deformable", **arguments))


def test_without_the_plugin_the_scope_says_whose_layer_it_is():
    plugin.uninstall()
    with pytest.raises(ValueError, match=r"where the plugin is not installed, 'mmdcn.DCN'"):
        convert_to_deformable(zoo(), dict(type="DCN"), "conv")
    model = convert_to_deformable(zoo(), dict(type="mmdcn.DCN"), "conv")
    assert isinstance(model["conv"], layers.DeformConv2dPack)
