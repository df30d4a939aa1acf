"""The model in PyTorch, traced to graphs, and its weights on their way into files."""
