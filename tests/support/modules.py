"""Module systems."""
