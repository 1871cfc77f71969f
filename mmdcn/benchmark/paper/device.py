"""The rates of a GPU, and how long a step takes at them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What a GPU does in a microsecond. Data sheets' numbers, but for what is marked as assumed."""

    name: str
    multiprocessors: int
    instructions: float  # of warps, at full rate
    flops: dict[str, float]  # of dense products
    l1: float  # bytes
    l2: float  # bytes
    memory: float  # bytes
    l2_size: int  # bytes
    # Assumed: shares of full rates that kernels reach.
    issue: float  # of instructions, by kernels that wait for memory in between
    product: dict[str, float]  # of products, by cuBLAS and cuDNN where the device is full
    split: float  # of these, where sums are split so that more multiprocessors have work; 0: never
    l1_hits: float  # corners that come from the first-level cache, when vectors are gathered
    # Assumed: rates.
    permuted: float  # bytes read and written by torch's copies that change the layout
    sectors: float  # of 32 bytes that atomic additions change in L2
    launch: float  # microseconds between two kernels that depend on each other

    def resident(self, size: float) -> bool:
        """Whether a tensor stays in L2 from one kernel to the next, beside what else they use."""
        return size <= self.l2_size / 2


_CLOCK = 1755.0  # per microsecond, of an H100 SXM at work
_TFLOPS = 1e6  # in FLOPs per microsecond
_GBYTES = 1e3  # in bytes per microsecond

#: An NVIDIA H100 SXM. Its L2 is read at about 5.5 TB/s in published microbenchmarks. Additions are
#: assumed to change sectors at half of that rate, as each is read and written.
H100 = Device(
    name="H100 SXM",
    multiprocessors=132,
    instructions=132 * 4 * _CLOCK,
    flops={
        "float32": 67 * _TFLOPS,
        "tf32": 494 * _TFLOPS,
        "float16": 989 * _TFLOPS,
        "bfloat16": 989 * _TFLOPS,
    },
    l1=132 * 128 * _CLOCK,
    l2=5500 * _GBYTES,
    memory=3350 * _GBYTES,
    l2_size=50 << 20,
    issue=0.7,
    product={"float32": 0.75, "tf32": 0.6, "float16": 0.6, "bfloat16": 0.6},
    split=0.9,
    l1_hits=0.5,
    permuted=1000 * _GBYTES,
    sectors=5500 * _GBYTES / 2 / 32,
    launch=2.0,
)


@dataclass(frozen=True)
class Step:
    """What one or more launches of a kernel use of a device.

    The times of all of it overlap but for that of launching, so the longest one counts: which is
    optimistic, and so for everybody alike.
    """

    name: str
    launches: float = 1
    instructions: float = 0  # of warps
    l1: float = 0  # bytes
    l2: float = 0
    memory: float = 0
    permuted: float = 0
    sectors: float = 0
    busy: float = 0  # microseconds of the units that multiply matrices

    def microseconds(self, device: Device) -> float:
        return self.launches * device.launch + max(self.uses(device).values())

    def uses(self, device: Device) -> dict[str, float]:
        """How long each part of the device would take alone, in microseconds."""
        return {
            "instructions": self.instructions / (device.instructions * device.issue),
            "L1": self.l1 / device.l1,
            "L2": self.l2 / device.l2,
            "memory": self.memory / device.memory,
            "permuting": self.permuted / device.permuted,
            "additions": self.sectors / device.sectors,
            "products": self.busy,
        }

    def bound_by(self, device: Device) -> str:
        """The part of the device that takes longest."""
        uses = self.uses(device)
        return max(uses, key=uses.get)


def total(steps: list[Step], device: Device) -> float:
    """Microseconds of some steps, one after the other."""
    return sum(step.microseconds(device) for step in steps)
