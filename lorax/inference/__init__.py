"""Using what was trained: generation."""
