"""Training: configuration, loop, optimiser, distillation, checkpoints and logs."""
