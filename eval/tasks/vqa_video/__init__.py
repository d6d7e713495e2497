"""Questions about videos, of which the model is shown frames; a file each."""
