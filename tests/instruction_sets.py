"""The instruction sets that the CPU kernels are compiled for, the least first."""

CAPABILITIES = ("portable", "avx2", "avx512", "avx512_bf16", "avx512_amx")


def up_to(best: str) -> tuple[str, ...]:
    """Those that a machine has whose best is this one."""
    return CAPABILITIES[: CAPABILITIES.index(best) + 1]
