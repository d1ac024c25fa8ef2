"""Which tensors of which layers are weights, and their views. Knows types, changes no module."""
