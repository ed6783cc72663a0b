"""Classify many pictures: read the sources, run the model, write rows of answers."""
