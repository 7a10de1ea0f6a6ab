"""What goes into a model: images, labels, preprocessing, lists of images."""
