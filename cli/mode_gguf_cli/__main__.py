"""`python -m mode_gguf_cli` is `mode-gguf`."""

from mode_gguf_cli.main import main

main()
