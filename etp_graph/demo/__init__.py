"""Small networks, real data and a plain training loop: what ``etp-graph demo`` and the benchmarks run on."""
