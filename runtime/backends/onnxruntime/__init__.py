"""The backends on ONNX Runtime: ``onnxruntime`` and ``onnxruntime-cuda``."""
