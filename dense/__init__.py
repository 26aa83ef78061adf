"""Pieces that segmentation and detection share: the pyramid of the backbone, resizing, drawn samples, drawings."""
