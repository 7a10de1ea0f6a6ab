"""Prediction of images and videos on disk, and the annotation formats of other tools."""
