"""Other people's systems around normalised modules: each file is for one, and registers itself."""
