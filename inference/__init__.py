"""Models with their weights, ready for pictures and videos."""
