"""PRIME: reinforcement learning with online implicit process rewards."""
