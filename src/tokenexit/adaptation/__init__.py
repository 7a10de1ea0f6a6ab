"""Exits for a trained dense model, from unlabelled photos: `tokenexit.adapt` and what it is made of."""
