"""Arguments that a layer does not take, in an error that names the layer and what it takes."""

import copy
import re

import pytest
import torch

from mmdcn import layers
from tests.layers import examples

CALLS = {name: ((2,) if "RoIPool" in name else (8, 8, 3)) for name in layers.__all__}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("toolbox", [False, True], ids=["torch", "toolbox"])
def test_the_error_names_the_layer(name, toolbox):
    cls = getattr(layers, name)
    if toolbox:
        pytest.importorskip("mmcv.ops")
        from mmdcn import plugin

        cls = plugin.LAYERS[name]
    misspelt = "gama" if "RoIPool" in name else "deform_group"
    meant = "gamma" if "RoIPool" in name else "deform_groups"
    for arguments, named, message in (
        (
            CALLS[name],
            {misspelt: 1},
            rf"unknown argument '{misspelt}' \(did you mean '{meant}'\?\)",
        ),
        (CALLS[name], {"padding_mode": "zeros"}, "unknown argument 'padding_mode'.*; it takes .*"),
        ((4,) * 13, {}, r"expected at most \d+ arguments without a name \(.*\), got 13"),
    ):
        with pytest.raises(TypeError, match=f"^{name}: {message}"):
            cls(*arguments, **named)
    if "RoIPool" not in name:
        with pytest.raises(TypeError, match=f"^{name}: expected kernel_size, got none"):
            cls(8, 8)


@pytest.mark.parametrize("other", ["group", "num_groups", "offset_groups"])
@pytest.mark.parametrize("name", ["DCNv3", "DCNv4", "DeformConv2dPack"])
def test_names_of_others_are_understood(name, other):
    with pytest.raises(TypeError, match=r"\(did you mean 'deform_groups'\?\)"):
        getattr(layers, name)(8, 8, 3, **{other: 2})


@pytest.mark.parametrize("name", [n for n in CALLS if n.endswith("dPack") or n[:3] == "DCN"])
def test_inputs_that_a_layer_cannot_take(name):
    layer = examples.build(name)
    (x,) = examples.inputs(name)
    unbatched = re.escape(str(tuple(x[0].shape)))
    for given, (error, message) in (
        (x[0], (ValueError, rf"got one of shape {unbatched}: add the batch by x\[None\]")),
        (x[None], (ValueError, r"of shape \(N, 8, .*\), got one of shape \(1, 2, 8,")),
        (x[:, :3], (ValueError, r"of shape \(N, 8, .*\), got 3 channels")),
        (x.numpy(), (TypeError, r"to be a tensor \(N, 8, .*\), got <class 'numpy.ndarray'>")),
        (x.int(), (TypeError, r"of floating point, got torch.int32: x.float\(\)")),
        (x.double(), (TypeError, r"of torch.float32, .* got torch.float64: convert it by")),
        (x.bfloat16(), (TypeError, r"of torch.float32, .* got torch.bfloat16: convert it by")),
    ):
        with pytest.raises(error, match=f"^{name}: expected .*{message}"):
            layer(given)
    assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", CALLS)
def test_no_private_class_is_named(name):
    class Derived(getattr(layers, name)):
        def __init__(self, *args, own=1, **kwargs):
            super().__init__(*args, **kwargs, **{f"its_{own}": own} if own > 1 else {})

    for cls, own in ((getattr(layers, name), {}), (Derived, {"own": 2})):
        with pytest.raises(TypeError, match="argument") as error:
            cls(*CALLS[name] if own else (), **own)
        assert "_Over" not in str(error.value) and "Base" not in str(error.value)


def test_derived_classes_take_what_they_like():
    class Derived(layers.DCNv3):
        def __init__(self, channels, *args, **kwargs):
            assert kwargs.pop("own") == 2
            super().__init__(channels, channels, 3, *args, **kwargs)

    layer = Derived(8, 1, 1, own=2, deform_groups=2)
    assert copy.deepcopy(layer).deform_groups == 2


def test_groups_that_do_not_fit_are_told_which_would():
    with pytest.raises(
        ValueError, match=r"deform_groups=4, got 6; deform_groups can be 1, 2, 3, 6"
    ):
        layers.DCNv4(6, 6, 3)
    with pytest.raises(ValueError, match="groups=4, got 6; groups can be 1, 2, 3, 6"):
        layers.DeformConv1d(6, 8, 3, groups=4)


def test_every_example_is_built():
    assert {*CALLS} == {*examples.NAMES}
