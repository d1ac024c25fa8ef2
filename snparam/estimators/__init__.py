"""Estimators of the singular values of a stack of matrices. Knows `matrices`, not modules."""
