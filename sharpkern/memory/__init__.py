"""Layer 2: where weights, gradients, state and the numbers of a step lie, and how they get to a device."""
