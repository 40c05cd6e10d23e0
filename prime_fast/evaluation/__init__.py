"""Accuracy on files of rows, best-of-n, and their reports."""
