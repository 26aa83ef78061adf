"""Semantic segmentation with XCiT: Semantic FPN and UPerNet."""
