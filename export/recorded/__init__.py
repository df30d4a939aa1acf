"""What ONNX Runtime answers, recorded, for engines to be compared with. Nothing here needs PyTorch."""
