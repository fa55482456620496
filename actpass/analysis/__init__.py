"""Facts of a joint graph: weight gradients, what crosses a cut, how the backward reads it, what can be run again. Knows no
policy."""
