"""Vision encoders of Hugging Face transformers."""
