"""Checks of the arguments that layers are built with. They raise ValueError."""

from torch.nn.modules.utils import _ntuple


def check_int(name: str, value: int) -> None:
    """Require an int of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")


def check_channels(in_channels: int, out_channels: int, groups: int, deform_groups: int) -> None:
    """Require numbers of channels that the numbers of groups divide."""
    check_int("in_channels", in_channels)
    check_int("out_channels", out_channels)
    check_int("groups", groups)
    check_int("deform_groups", deform_groups)
    for name, channels, divisor_name, divisor in (
        ("in_channels", in_channels, "groups", groups),
        ("out_channels", out_channels, "groups", groups),
        ("in_channels", in_channels, "deform_groups", deform_groups),
    ):
        if channels % divisor:
            raise ValueError(
                f"{name}: expected a multiple of {divisor_name}={divisor}, got {channels}"
            )


def check_numbers(
    name: str, value: int | tuple[int, ...], minimum: int, rank: int
) -> tuple[int, ...]:
    """The value as one number for each dimension."""
    numbers = _ntuple(rank)(value)
    if len(numbers) != rank or not all(isinstance(v, int) and v >= minimum for v in numbers):
        several = {
            1: "one in a tuple",
            2: "a pair of ints (vertical, horizontal)",
            3: "three ints (depth, vertical, horizontal)",
        }
        raise ValueError(
            f"{name}: expected an int or {several[rank]}, each at least {minimum}, got {value!r}"
        )
    return numbers


def check_pair(name: str, value: int | tuple[int, int], minimum: int) -> tuple[int, int]:
    """The value as a number for the height and one for the width."""
    return check_numbers(name, value, minimum, 2)
