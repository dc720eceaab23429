"""Weights of models: files, the official release, fine-tuning."""
