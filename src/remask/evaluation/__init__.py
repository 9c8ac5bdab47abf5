"""Benchmarks, metrics, statistics and audits; blind to which intervention is attached."""
