"""Attacks: ways to get at forgotten facts; one file a kind, one registry."""
