"""The GPU of the TensorRT backend, through pycuda and cuda-bindings."""
