"""Other people's systems around normalised modules, a file each, which registers itself."""
