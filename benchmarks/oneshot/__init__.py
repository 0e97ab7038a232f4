"""Pruning without training on networks other than language models."""
