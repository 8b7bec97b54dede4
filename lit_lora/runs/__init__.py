"""A run as a whole: where it starts and lies, what it has to say of itself."""
