"""Inspection of singular values, tracked and exact, and plots of them; no model is changed."""
