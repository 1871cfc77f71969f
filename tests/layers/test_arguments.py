"""Arguments that a layer does not take, in an error that names the layer and what it takes."""

import copy

import pytest

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
