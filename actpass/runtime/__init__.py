"""What lives across steps: the clock, the regions that ran, and their records on disk."""
