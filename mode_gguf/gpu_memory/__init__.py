"""What a converted model takes in a GPU's memory, computed from the checkpoint's metadata."""
