"""Bundles to TensorRT plans. Nothing here needs PyTorch."""
