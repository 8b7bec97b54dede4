"""What a step will take, traced without taking it."""
