"""Chat templates: which of a checkpoint's is used, and rendering them in a process with limits."""
