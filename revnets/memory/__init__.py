"""Memory of a training step: measured, estimated on fake tensors, planned and kept under a budget."""
