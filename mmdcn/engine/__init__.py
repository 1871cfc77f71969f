"""What the command-line tools share: safe checkpoints, checks before training, launching."""
