"""Small faults planted in the kernels and operators, each of which the tests must find."""
