"""What a run will hold, by its configuration and the sources of what it runs on, and what to change if it is much."""
