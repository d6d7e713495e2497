"""Commands of `vtok eval`, a file a kind of task."""
