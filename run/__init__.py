"""What surrounds a training step, for any task: flags, processes, the training itself, checkpoints, signals, logs.

A library: programs call it, and whoever wants a loop of their own can use its parts without the rest. CONTRIBUTING.md
has the map.
"""
