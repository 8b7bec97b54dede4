"""The frozen base: loading, holding and quantizing it, and which one it is."""
