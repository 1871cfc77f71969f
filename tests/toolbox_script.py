"""Run as ``python -m tests.toolbox_script before|after``: what toolbox code runs through mmcv.ops.

Imports mmcv, mmdet and a "user's" module before mmdcn, or after it; then runs them, counts the
kernels, gives everything back and compares with the beginning. Prints one line of JSON.
"""

import json
import pickle
import sys
from types import ModuleType

import torch

from tests.kernel_calls import KernelCalls

USER_CODE = """
import mmcv.ops.deform_conv
from mmcv.ops import DeformConv2dPack as Pack, deform_conv2d as v1, modulated_deform_conv2d
from mmcv.ops.modulated_deform_conv import ModulatedDeformConv2dFunction
v2 = ModulatedDeformConv2dFunction.apply

class Subclass(Pack):
    def forward(self, x):
        return super().forward(x) + 1

def call_apply(*args):
    return mmcv.ops.deform_conv.DeformConv2dFunction.apply(*args)
"""


def snapshot() -> dict[str, object]:
    """What the plugin may touch: the registry, and all module attributes that hold functions."""
    from mmcv.ops import deform_conv, modulated_deform_conv
    from mmengine.registry import MODELS

    seen = {f"registry {name}": entry for name, entry in MODELS.module_dict.items()}
    for module_name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and module_name.startswith(("mmcv.ops", "mmdet", "user")):
            for name, value in vars(module).items():
                if callable(value):
                    seen[f"{module_name}.{name}"] = value
    for function in (
        deform_conv.DeformConv2dFunction,
        modulated_deform_conv.ModulatedDeformConv2dFunction,
    ):
        for name, value in vars(function).items():
            seen[f"{function.__name__} {name}"] = value
    return seen


def import_toolbox() -> ModuleType:
    import mmcv.ops  # noqa: F401
    import mmdet.models  # noqa: F401

    user = ModuleType("user_module")
    sys.modules["user_module"] = user
    exec(USER_CODE, vars(user))
    return user


def heads() -> dict[str, tuple[torch.nn.Module, int]]:
    """Heads and necks that call mmcv.ops by themselves, and how often for two levels."""
    from mmengine.registry import DefaultScope

    # A runner before may have left another one.
    with DefaultScope.overwrite_default_scope("mmdet"):
        return _build_heads()


def _build_heads() -> dict[str, tuple[torch.nn.Module, int]]:
    from mmdet.registry import MODELS

    common = dict(in_channels=32, feat_channels=32, num_classes=2)
    return {
        # Classification and refinement, at each level.
        "VFNetHead": (MODELS.build(dict(type="VFNetHead", stacked_convs=1, **common)), 4),
        "RepPointsHead": (
            MODELS.build(
                dict(
                    type="RepPointsHead",
                    stacked_convs=1,
                    point_feat_channels=32,
                    point_strides=[8, 16],
                    **common,
                )
            ),
            4,
        ),
        "GARetinaHead": (MODELS.build(dict(type="GARetinaHead", stacked_convs=1, **common)), 4),
        # One adaption at each level.
        "GARPNHead": (
            MODELS.build(dict(type="GARPNHead", in_channels=32, feat_channels=32)),
            2,
        ),
        "TOODHead": (
            MODELS.build(
                dict(
                    type="TOODHead",
                    stacked_convs=2,
                    anchor_generator=dict(
                        type="AnchorGenerator",
                        ratios=[1.0],
                        octave_base_scale=8,
                        scales_per_octave=1,
                        strides=[8, 16],
                    ),
                    **common,
                )
            ),
            2,
        ),
        # Each level by itself, and with each neighbour.
        "DyHead": (
            MODELS.build(dict(type="DyHead", in_channels=32, out_channels=32, num_blocks=1)),
            4,
        ),
    }


def tensors(nested) -> list[torch.Tensor]:
    if isinstance(nested, torch.Tensor):
        return [nested]
    return [t for item in nested for t in tensors(item)] if nested is not None else []


def run(model: torch.nn.Module, *inputs) -> dict[str, int]:
    """The kernels of one forward and backward pass."""
    with KernelCalls() as calls:
        outputs = [t for t in tensors(model(*inputs)) if t.requires_grad]
        sum(t.square().mean() for t in outputs).backward()
    return {"forward": calls.forward, "backward": calls.backward, "mmcv": calls.mmcv}


def main(order: str) -> None:
    result = {}
    if order == "before":
        user = import_toolbox()
        built = {"instance": user.Pack(4, 4, 3, padding=1), "subclass": user.Subclass(4, 4, 3)}
        pickled = pickle.dumps(built["instance"])
        at_first = snapshot()
    import mmdcn  # noqa: F401
    from mmdcn import plugin

    if order == "after":
        user = import_toolbox()
        built = {"instance": user.Pack(4, 4, 3, padding=1), "subclass": user.Subclass(4, 4, 3)}
        pickled = pickle.dumps(built["instance"])

    torch.manual_seed(0)
    levels = [torch.randn(2, 32, size, size, requires_grad=True) for size in (16, 8)]
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    offset = torch.randn(2, 18, 4, 4, requires_grad=True)
    mask = torch.rand(2, 9, 4, 4, requires_grad=True)
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)
    calls = {
        "function v1": (user.v1, x, offset, weight, 1, 0, 1, 1, 1),
        "function v2": (user.v2, x, offset, mask, weight, None, 1, 0, 1, 1, 1),
        "apply": (user.call_apply, x, offset, weight, 1, 0, 1, 1, 1),
        "instance": (built["instance"], x),
        "subclass": (built["subclass"], x),
        "unpickled": (pickle.loads(pickled), x),
    }
    result["user"] = {name: run(*call) for name, call in calls.items()}
    result["heads"] = {}
    for name, (model, expected) in heads().items():
        result["heads"][name] = run(model, levels) | {"expected": expected}
    result["report"] = plugin.report().functions
    result["isinstance"] = [
        isinstance(built["instance"], __import__("mmcv.ops").ops.DeformConv2d),
        isinstance(plugin.LAYERS["DCN"](4, 4, 3), user.Pack),
    ]

    plugin.uninstall()
    if order == "before":
        at_last = snapshot()
        result["changed"] = [name for name in at_first if at_last.get(name) != at_first[name]]
        result["added"] = [name for name in at_last if name.startswith("registry")]
        result["added"] = sorted(set(result["added"]) - set(at_first))
    calls["function v1"] = (user.v1, *calls["function v1"][1:])
    calls["function v2"] = (user.v2, *calls["function v2"][1:])
    result["uninstalled"] = {name: run(*call) for name, call in calls.items()}
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
