"""The choice of smoothing, clipping and scales from observations."""
