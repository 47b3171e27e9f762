"""Torch modules, weights, and the data that describes them. No ray, no index."""
