"""What a token knows, what a method may look at, how tokens move, and what a forward pass remembers."""
