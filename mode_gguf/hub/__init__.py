"""The Hugging Face Hub: checkpoints that come from it, and results that go there, with their model card."""
