"""Decoders in integers: from a plan to graphs and weights. Nothing here needs PyTorch."""
