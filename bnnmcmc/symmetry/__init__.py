"""Symmetries of networks: transformations of the weights that leave the function unchanged."""
