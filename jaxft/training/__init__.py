"""The training loop: one jitted step over a mesh, checkpoints, metrics."""
