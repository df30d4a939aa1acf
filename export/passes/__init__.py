"""Rewriting graphs. Nothing here needs PyTorch."""
