"""GPU memory of a converted model, computed from the checkpoint's metadata."""
