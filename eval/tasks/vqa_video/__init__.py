"""Questions about videos, of which the model is shown frames; a set of them a file, and `videos.py`, which finds them."""
