"""Data generators of the demo checkpoint: records, pictures, text and the tokenizer. Everything is seeded."""
