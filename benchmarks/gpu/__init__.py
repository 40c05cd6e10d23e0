"""Everything there is to measure on one NVIDIA GPU, in stages: see __main__.py."""
