"""Inputs of a model: images, labels, preprocessing, lists of images."""
