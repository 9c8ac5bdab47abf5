"""Metrics: one file a group, pure functions first, then what reads a model; docs/metrics.md lists them all."""
