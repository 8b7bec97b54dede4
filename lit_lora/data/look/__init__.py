"""What the data is, for people to look at."""
