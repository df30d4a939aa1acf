"""``python -m runtime.bench``: how fast a bundle answers here, and what memory it takes."""
