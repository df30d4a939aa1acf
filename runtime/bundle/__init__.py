"""The bundle: its manifest, its reader, its embeddings, and which of its engines are stale."""
