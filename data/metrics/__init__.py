"""Scores of benchmarks: predictions and references in, fractions out; one file each."""
