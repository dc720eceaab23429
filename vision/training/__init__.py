"""Training: the trainer, its state, evaluation and logs."""
