"""Rows and what they are read from."""
