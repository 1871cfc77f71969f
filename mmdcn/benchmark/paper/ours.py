"""The steps of our operator on paper: as `csrc/cuda/deform_conv/operator.cpp` makes them."""

import math
from dataclasses import dataclass

from . import counts
from .device import Device, Step
from .problem import WARP, Problem, even_parts, moving, permuting_copy, product_time

_THREADS = 256
_GATHER_SAMPLES, _SCATTER_SAMPLES = 256, 128  # of a block
LEAST_CHUNK, LARGEST_CHUNK = 16 << 20, 48 << 20  # bytes
COPIES = 8 << 20  # bytes
_COORDINATES = 12  # bytes of a sample's offset and mask


@dataclass(frozen=True)
class Chunks:
    """Pixels of each chunk of a call, and how many spans of images these belong to."""

    pixels: list[int]
    spans: int

    @classmethod
    def of(cls, device: Device, problem: Problem, image_bytes: float) -> "Chunks":
        """As `chunks.h` and `images_at_a_time` cut, if the copies of an image take so much."""
        size = min(max(device.l2_size // 2, LEAST_CHUNK), LARGEST_CHUNK)
        most = size // (problem.row * problem.element)
        images = min(max(int(COPIES // image_bytes), 1), problem.batch)
        pixels, spans = [], 0
        for first in range(0, problem.batch, images):
            spans += 1
            span = min(images, problem.batch - first)
            whole = min(max(most // problem.pixels, 1), span)
            for together in even_parts(span, whole):
                pixels += [together * part for part in even_parts(problem.pixels, most)]
        return cls(pixels, spans)


def forward_chunks(device: Device, problem: Problem) -> int:
    """The number of chunks in which the forward pass works."""
    return len(_forward_chunks(device, problem).pixels)


def _forward_chunks(device: Device, problem: Problem) -> Chunks:
    return Chunks.of(device, problem, problem.input / problem.batch * problem.element)


def forward(device: Device, problem: Problem) -> list[Step]:
    """The forward pass, with a bias."""
    element = problem.element
    chunks = _forward_chunks(device, problem)
    product = [
        product_time(device, problem.arithmetic, pixels, problem.out_channels, problem.row)
        for pixels in chunks.pixels
    ]
    steps = [
        permuting_copy("copies", 2 * element * problem.input, chunks.spans),
        permuting_copy("copies", 2 * element * problem.weight),
        _gather(device, problem, chunks),
        Step(
            "product",
            len(chunks.pixels),
            l2=element * (problem.columns + problem.output),
            busy=sum(product),
        ),
    ]
    if _by_cudnn(problem):
        # It writes channels last only, so the output is copied into its planes.
        copied = permuting_copy("copies", 2 * element * problem.output, len(chunks.pixels))
        steps.append(copied)
    bias = moving(
        device,
        "bias",
        element * problem.output,
        2 * element * problem.output,
        instructions=problem.output * element / 16 / WARP * counts.ADD_BIAS[problem.dtype],
    )
    return [*steps, bias]


def backward(device: Device, problem: Problem) -> list[Step]:
    """The backward pass, all gradients but that of the bias, which torch's sum() computes."""
    element = problem.element
    image_bytes = (2 * element + 4) * problem.input + element * (problem.output - problem.input)
    chunks = Chunks.of(device, problem, image_bytes / problem.batch)
    launches = len(chunks.pixels)
    columns = element * (problem.columns + problem.output)
    to_columns = [
        product_time(device, problem.arithmetic, pixels, problem.row, problem.out_channels)
        for pixels in chunks.pixels
    ]
    to_weight = [
        product_time(device, problem.arithmetic, problem.out_channels, problem.row, pixels)
        for pixels in chunks.pixels
    ]
    copied = 2 * element * (problem.input + problem.output)
    steps = [
        permuting_copy("copies", copied, 2 * chunks.spans),
        permuting_copy("copies", 2 * element * problem.weight),
        moving(device, "gradients", 4 * problem.input, 4 * problem.input, launches=chunks.spans),
        _gather(device, problem, chunks),
        Step("products", launches, l2=columns + 4 * problem.weight * launches, busy=sum(to_weight)),
        Step("products", launches, l2=columns, busy=sum(to_columns)),
        _scatter(device, problem, chunks),
        permuting_copy("gradients", (4 + element) * problem.input, chunks.spans),
        permuting_copy("gradients", (4 + element) * problem.weight),
    ]
    if launches > 1:
        steps.append(
            Step(
                "gradients",
                launches - 1,
                instructions=(launches - 1) * problem.weight / WARP * counts.ACCUMULATE,
                l2=(launches - 1) * 12 * problem.weight,
            )
        )
    if _by_cudnn(problem):
        # The weight is transposed for each chunk.
        size = 2 * element * problem.weight * launches
        steps.append(permuting_copy("copies", size, launches))
    return steps


def _by_cudnn(problem: Problem) -> bool:
    """Whether the output and the gradient of the columns are cuDNN's: see `ops/_products.py`."""
    return problem.arithmetic != "float32"


def _lanes(vectors: int) -> int:
    """Lanes that work on one sample's channels."""
    return min(WARP, 1 << (vectors.bit_length() - 1))


def _gather(device: Device, problem: Problem, chunks: Chunks) -> Step:
    count = counts.GATHER[problem.dtype]
    vectors = problem.channels * problem.element // 16
    lanes = _lanes(vectors)
    per_sample = count.sample + count.vector * math.ceil(vectors / lanes)
    per_block = _THREADS / WARP * (count.block + count.locate * _GATHER_SAMPLES / _THREADS)
    corners = 4 * problem.element * problem.columns
    written = problem.element * problem.columns
    return Step(
        "gather",
        len(chunks.pixels),
        instructions=problem.samples * (per_sample * lanes / WARP + per_block / _GATHER_SAMPLES),
        l1=corners + written,
        l2=corners * (1 - device.l1_hits) + written,
        memory=_COORDINATES * problem.samples,
    )


def _scatter(device: Device, problem: Problem, chunks: Chunks) -> Step:
    count = counts.SCATTER[problem.dtype]
    vectors = problem.channels // 4
    lanes = _lanes(vectors)
    exchanges = int(math.log2(lanes))  # the dots of the corners are added up over the lanes
    per_sample = count.sample + count.vector * math.ceil(vectors / lanes)
    per_sample += count.shuffle * exchanges
    # Half of the threads locate and finish a sample each; the others wait.
    busy = _SCATTER_SAMPLES / WARP
    per_block = _THREADS / WARP * count.block + busy * (count.locate + count.finish)
    read = problem.element * problem.columns
    added = 4 * 4 * problem.columns
    return Step(
        "scatter",
        len(chunks.pixels),
        instructions=problem.samples * (per_sample * lanes / WARP + per_block / _SCATTER_SAMPLES),
        l1=5 * read + added,
        l2=4 * read * (1 - device.l1_hits) + read,
        memory=2 * _COORDINATES * problem.samples,
        sectors=added / 32,
    )
