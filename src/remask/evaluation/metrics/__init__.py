"""Metrics on generated text."""
