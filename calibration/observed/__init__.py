"""Observations of what reaches the matrices of a decoder, and their file."""
