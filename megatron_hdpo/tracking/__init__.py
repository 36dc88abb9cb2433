"""What a run records of itself, and what people see of it."""
