"""Benchmarks: correctness first, ceilings measured in the same run, results under bench/results."""
