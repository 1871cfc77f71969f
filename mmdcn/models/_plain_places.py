"""What a converted model shows to code that initialises or freezes it: the plain model."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

__all__ = ["InitWeights", "Place", "Train"]


class Place(NamedTuple):
    """A place in a model where a deformable layer has replaced a convolution."""

    parent: nn.Module
    name: str
    conv: nn.Module
    layer: nn.Module


class InitWeights:
    """A model's ``init_weights`` that sees the plain convolutions in their old places.

    Whatever initialises the model, by the class of a layer or by its name, from a distribution or
    from a file, thus treats them as it does in the plain model, and leaves the offset branches
    as they are, unless the file has them. The convolutions share their parameters with the layers.
    """

    def __init__(self, init_weights: Callable[[], None], places: list[Place]) -> None:
        self.init_weights = init_weights
        self.places = places

    def __call__(self) -> None:
        handles = []
        # setattr would make the parents register once more what they do for a new child.
        for parent, name, conv, layer in self.places:
            conv.weight, conv.bias = layer.weight, layer.bias
            parent._modules[name] = conv
            handles.append(conv.register_load_state_dict_pre_hook(_Fill(layer)))
        try:
            self.init_weights()
        finally:
            for handle in handles:
                handle.remove()
            for parent, name, _, layer in self.places:
                parent._modules[name] = layer


class _Fill:
    """Loads the part of a state dict that is the offset branch's, and takes it out."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(
        self,
        conv: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        given = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        own = {f"{prefix}{name}" for name in conv._parameters}
        # The layer loads what the convolution will once more, and renames former keys.
        self.layer._load_from_state_dict(given, prefix, metadata, False, [], [], [])
        self.layer.conv_offset._load_from_state_dict(
            given, f"{prefix}conv_offset.", {}, False, [], [], errors
        )
        for key in given.keys() & state_dict.keys() - own:
            if "offset" in key.removeprefix(prefix):
                del state_dict[key]


class Train:
    """A module's ``train`` that leaves the offset branches inside as trainable as they are.

    Where a module freezes stages of itself whenever its mode is set, as mmdet's backbones do by
    ``frozen_stages``, it freezes what they have in the plain model.
    """

    def __init__(self, train: Callable[..., nn.Module], branches: list[nn.Module]) -> None:
        self.train = train
        self.branches = branches

    def __call__(self, mode: bool = True) -> nn.Module:
        parameters = [p for branch in self.branches for p in branch.parameters()]
        trainable = [p.requires_grad for p in parameters]
        try:
            return self.train(mode)
        finally:
            for parameter, was in zip(parameters, trainable):
                parameter.requires_grad_(was)
