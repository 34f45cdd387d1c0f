"""What a training left behind, on one page."""
