"""From a stack of matrices to its singular values: knows `matrices`, no modules."""
