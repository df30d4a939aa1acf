"""A checkpoint on the disk: what is read of it, and every refusal."""
