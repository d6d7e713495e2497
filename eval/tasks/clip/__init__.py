"""Zero-shot classification and retrieval by dual encoders: CLIP, SigLIP, BLIP ..."""
