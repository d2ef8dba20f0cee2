"""Trained classifiers in use: evaluation, prediction, export."""
