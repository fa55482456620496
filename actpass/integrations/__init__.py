"""Callbacks for training frameworks. Each imports its framework when it is imported itself, and nothing else here does."""
