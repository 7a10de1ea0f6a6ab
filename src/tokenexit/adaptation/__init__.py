"""Adapt a trained dense model to leave early, from images without labels."""
