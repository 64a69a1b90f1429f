"""What a recording adds up to: pure functions on its records. Knows nothing of the engine."""
