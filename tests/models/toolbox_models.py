"""Small models of mmdet, one of each class that can be told what its convolutions are."""

import inspect
from typing import Any

from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from torch import nn

#: What tells a class of its convolutions.
ARGUMENTS = ("conv_cfg", "dcn", "dcn_cfg")

#: Classes that cannot be built here, and why.
EXCLUDED = {
    "ATSSVLFusionHead": "needs the package transformers",
    "AnchorFreeHead": "is abstract",
    "Mask2FormerHead": "takes conv_cfg from a class that it derives from, and passes it to none",
    "Mask2FormerTrackHead": "as Mask2FormerHead",
    "MaskFormerHead": "as Mask2FormerHead",
    "QuasiDenseEmbedHead": "does not build with its own defaults",
    "Shared2FCBBoxHead": "has no convolution",
}

# Arguments that make small models, for the classes that take them.
_GENERAL: dict[str, Any] = dict(
    num_classes=3,
    in_channels=32,
    feat_channels=32,
    out_channels=32,
    stacked_convs=1,
    num_convs=1,
    conv_out_channels=32,
    base_channels=8,
    stem_channels=8,
    num_outs=2,
    depth=50,
    stage_with_dcn=(False, True, True, True),
)
_LEVELS: dict[str, Any] = dict(in_channels=[32, 32])
_SMALL_CSP: dict[str, Any] = dict(widen_factor=0.125, deepen_factor=0.34)
_SPATIAL: dict[str, Any] = dict(num_ins=2, fusion_level=0)
_ANCHORS: dict[str, Any] = dict(
    type="SSDAnchorGenerator",
    scale_major=False,
    input_size=300,
    basesize_ratio_range=(0.15, 0.9),
    strides=[8],
    ratios=[[2]],
)
_ONE_ANCHOR: dict[str, Any] = dict(
    type="AnchorGenerator", ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8, 16]
)
_STAGES: dict[str, Any] = {
    f"stage{n}": dict(
        num_modules=1,
        num_branches=n,
        block="BOTTLENECK" if n == 1 else "BASIC",
        num_blocks=(1,) * n,
        num_channels=(8, 16, 32, 64)[:n],
    )
    for n in (1, 2, 3, 4)
}

# What a class asks for beyond that, or instead; None leaves an argument out.
_PARTICULAR: dict[str, dict[str, Any]] = {
    "BFP": dict(num_levels=2, refine_level=1, refine_type="conv"),
    "CSPDarknet": _SMALL_CSP,
    "CSPNeXt": _SMALL_CSP,
    "CSPNeXtPAFPN": dict(in_channels=[32, 32, 32], num_csp_blocks=1),
    "ChannelMapper": _LEVELS | dict(kernel_size=3),
    "ConvFCBBoxHead": dict(num_shared_convs=1, num_shared_fcs=1, fc_out_channels=32),
    "Darknet": dict(depth=53),
    "DoubleConvFCBBoxHead": dict(num_convs=2, num_fcs=1, conv_out_channels=32, fc_out_channels=32),
    "FPN": _LEVELS,
    "FPN_DropBlock": _LEVELS,
    "FusedSemanticHead": _SPATIAL,
    "GFLHead": dict(anchor_generator=_ONE_ANCHOR),
    "HRFPN": _LEVELS,
    "HRNet": dict(extra=_STAGES),
    "LDHead": dict(
        anchor_generator=_ONE_ANCHOR, loss_ld=dict(type="KnowledgeDistillationKLDivLoss", T=10)
    ),
    "MobileNetV2": dict(widen_factor=0.25),
    "NASFCOS_FPN": dict(in_channels=[32] * 4, num_outs=5),
    "PAFPN": _LEVELS,
    "PISASSDHead": _LEVELS | dict(in_channels=[32], anchor_generator=_ANCHORS, stacked_convs=1),
    "PanopticFPNHead": dict(num_classes=None, inner_channels=32),
    "RFP": _LEVELS
    | dict(
        rfp_steps=2,
        aspp_out_channels=8,
        rfp_backbone=dict(
            type="DetectoRS_ResNet", depth=50, base_channels=8, rfp_inplanes=32, output_img=True
        ),
    ),
    "RegNet": dict(arch=dict(w0=8, wa=8.0, wm=2.0, group_w=8, depth=8, bot_mul=1.0), depth=None),
    "Res2Net": dict(base_width=8),
    "RetinaSepBNHead": dict(num_ins=2),
    "SCNetBBoxHead": dict(num_shared_convs=1, num_shared_fcs=1, fc_out_channels=32),
    "SCNetSemanticHead": _SPATIAL,
    "SOLOV2Head": dict(
        mask_feature_head=dict(
            feat_channels=32, start_level=0, end_level=1, out_channels=32, mask_stride=4
        ),
        dcn_apply_to_all_conv=True,
    ),
    "SSDHead": dict(in_channels=[32], anchor_generator=_ANCHORS, stacked_convs=1),
    "SSDNeck": dict(in_channels=[32], out_channels=[32, 32], level_strides=[2], level_paddings=[1]),
    "SSH": dict(num_scales=1, in_channels=[32], out_channels=[32]),
    "TridentResNet": dict(
        num_branch=3,
        test_branch_idx=1,
        trident_dilations=(1, 2, 3),
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2,),
        stage_with_dcn=(False, True, True),
    ),
    "YOLOV3Head": dict(
        in_channels=[32],
        out_channels=[32],
        anchor_generator=dict(type="YOLOAnchorGenerator", base_sizes=[[(8, 8)]], strides=[32]),
        featmap_strides=[32],
    ),
    "YOLOV3Neck": dict(num_scales=1, in_channels=[32], out_channels=[32]),
    "YOLOXPAFPN": dict(in_channels=[32, 32, 32], num_csp_blocks=1),
}


def classes() -> dict[str, type[nn.Module]]:
    """The registered classes that take one of `ARGUMENTS`, by name."""
    register_all_modules(init_default_scope=False)
    return {
        name: cls
        for name, cls in sorted(MODELS.module_dict.items())
        if inspect.isclass(cls) and set(ARGUMENTS) & parameters(cls).keys()
    }


def parameters(cls: type) -> dict[str, inspect.Parameter]:
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            for name, parameter in inspect.signature(base.__init__).parameters.items():
                found.setdefault(name, parameter)
    return found


def build(name: str, layer: dict[str, Any]) -> nn.Module:
    """A small model of the class `name`, with `layer` wherever it can be told of its layers."""
    taken = parameters(MODELS.get(name))
    particular = _PARTICULAR.get(name, {})
    arguments = {key: value for key, value in _GENERAL.items() if key in taken} | particular
    told = next(argument for argument in ("dcn", "dcn_cfg", "conv_cfg") if argument in taken)
    arguments = {key: value for key, value in arguments.items() if value is not None}
    return MODELS.build(dict(type=f"mmdet.{name}", **arguments, **{told: layer}))
