"""What a run will hold, from its configuration and the sources of what it runs on; and what to change if it is too much."""
