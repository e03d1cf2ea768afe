"""What users call: `Durable` and what it makes, functions of workflow code, and functions of a caller's transaction."""
