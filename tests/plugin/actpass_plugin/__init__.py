"""What another package adds to actpass: one file for each thing, and an entry point that names it."""
