"""Prune a real language model, export it, and run it in engines without this library."""
