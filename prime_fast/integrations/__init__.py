"""Doors for people who live elsewhere: TRL and verl."""
