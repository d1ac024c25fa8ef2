"""One weight of one module: the SpectralNorm on it, how it gets there, when its state moves."""
