"""Low-bit forms, one a file."""
