"""Views of weights as stacks of matrices, and products with those. Knows tensors, not modules."""
