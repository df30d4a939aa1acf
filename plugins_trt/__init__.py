"""The FusedMoE operator family: its definition, its body in standard operators, and its TensorRT plugin."""
