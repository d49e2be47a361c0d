"""Text models: decoders that llama.cpp runs."""
