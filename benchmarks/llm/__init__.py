"""Pruning of a language model without training: methods on equal terms."""
