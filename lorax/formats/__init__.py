"""Other programs' files: the only rooms that know how they look."""
