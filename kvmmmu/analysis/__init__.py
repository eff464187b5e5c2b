"""Comparisons and measurements on top of the model."""
