"""Long work that stops, goes on and is shared."""
