"""Inspection: singular values, bounds of layers and networks, and plots; no model is changed."""
