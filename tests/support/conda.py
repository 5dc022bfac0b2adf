"""Conda prefixes."""
