"""Whole models: what is to be converted, converting it, and the way back."""
