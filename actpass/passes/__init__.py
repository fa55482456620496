"""One change of a graph a file, and what must hold behind it."""
