"""Training: settings, the step, the loop, checkpoints, the run folder."""
