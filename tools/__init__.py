"""Programs around trained models; each runs as `python -m tools.NAME` from the repository."""
