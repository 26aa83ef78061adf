"""Data loading: from data sets to batches, in any order and from any position of a run, or as streams."""
