"""The `mode-gguf` command line."""
