"""Speed, memory and FLOPs of patched models beside the unpatched ones."""
