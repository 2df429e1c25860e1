"""Sampling-based inference for Bayesian neural networks."""
