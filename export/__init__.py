"""Checkpoint → bundle. The only package of monoedge that imports torch."""
