"""Weights as stacks of matrices, and products with them: knows tensors alone, no modules."""
