"""What command lines share: how they end, what they say, progress bars, files written whole."""
