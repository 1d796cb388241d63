"""Language models and critics based on Hugging Face models, and the forward pass."""
