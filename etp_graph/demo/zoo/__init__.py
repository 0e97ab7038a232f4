"""Networks, images and a training loop that the demo and the benchmarks share."""
