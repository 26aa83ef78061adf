"""Image classification: evaluation with its report, and teachers for distillation; main.py is the program."""
