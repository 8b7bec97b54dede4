"""What a run says of itself: its outcome, and a page to look at."""
