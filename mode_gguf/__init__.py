"""mode-gguf: modality-aware mixed-precision GGUF quantization of Mixture-of-Experts vision-language models."""

__version__ = "0.1.0"
