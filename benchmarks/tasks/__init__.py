"""Real data sets for comparisons."""
