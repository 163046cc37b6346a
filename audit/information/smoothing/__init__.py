"""Smoothing of features by Gaussian noise: the unit of each feature, and the scale that fits a layer."""
