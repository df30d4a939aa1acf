"""From observations to a plan: smoothing, clipping, scales."""
