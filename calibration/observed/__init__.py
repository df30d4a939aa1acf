"""What reaches the matrices of a decoder, and the file that keeps it."""
