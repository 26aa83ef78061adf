"""Library around a training step, for any task: flags, processes, runs, checkpoints, signals, logs."""
