"""Shared parts of the command-line tools: safe checkpoints, checks before training, launching."""
