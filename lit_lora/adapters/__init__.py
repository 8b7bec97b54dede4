"""LoRA itself: the maths, and its life inside a model. Import from the modules here, or from ``lit_lora``."""
