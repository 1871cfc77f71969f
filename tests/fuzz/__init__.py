"""Random trials of what must not break: operators, malformed calls and checkpoints."""
