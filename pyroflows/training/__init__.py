"""Training: the loop, its checkpoints, what it reports, and maximum likelihood by it."""
