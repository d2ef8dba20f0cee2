"""Many trainings, their tables and statistics."""
