"""Rewriting graphs, one pass a file. Nothing here needs PyTorch."""
