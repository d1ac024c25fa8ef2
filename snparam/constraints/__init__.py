"""Constraints, which make the weight in use from a weight and its σ. Knows no modules."""
