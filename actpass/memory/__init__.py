"""Where bytes are over a step: Inductor's fusions, live tensors, peaks, and what is resident before it begins."""
