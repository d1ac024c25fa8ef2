"""Whole models: the plan of a conversion, the conversion, and the return to an ordinary model."""
