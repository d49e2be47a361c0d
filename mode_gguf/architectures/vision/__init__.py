"""Vision towers and their projectors, which llama.cpp's mtmd runs."""
