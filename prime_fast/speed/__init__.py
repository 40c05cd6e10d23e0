"""What a step will take: the plan in seconds."""
