"""The normalisation of one weight: its SpectralNorm, how it is attached, when its state moves."""
