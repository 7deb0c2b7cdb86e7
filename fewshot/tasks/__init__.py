"""What a task is made of: splits, episodes, and what must not leak between them."""
