"""A GPU as the TensorRT backend asks for it, through pycuda and cuda-bindings."""
