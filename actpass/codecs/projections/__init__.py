"""Projections: a few directions in place of all features, one published method a file."""
