"""When a written answer says what a ground truth says: the rules of docs/rewards.md, a file for each group of them."""
