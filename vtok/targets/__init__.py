"""What `patch` acts on: vision encoders and vision-language models."""
