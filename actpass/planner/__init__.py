"""Where to cut and what to store how: searched for within a budget, or read from a plan."""
