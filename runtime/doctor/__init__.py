"""What of this machine answering needs, and whether it is there: ``python -m runtime.doctor``."""
