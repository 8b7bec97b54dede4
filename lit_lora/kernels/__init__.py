"""Products, attention and loss on tensors alone."""
