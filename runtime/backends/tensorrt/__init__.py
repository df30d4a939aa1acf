"""The TensorRT backend: plans loaded, checked and run."""
