"""What learners are made of: encoders, batch norm, an optimiser, memories."""
