"""Pruning inside training frameworks. Each module imports its framework; importing ``etp_graph`` imports none."""
