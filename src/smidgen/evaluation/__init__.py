"""Evaluation: what a tuned model answers on held-out rows, next to its base."""
