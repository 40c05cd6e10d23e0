"""What is trained or made outside the loop."""
