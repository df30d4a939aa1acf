"""``python -m runtime.chat``: questions about images, answered in a terminal or a pipe."""
