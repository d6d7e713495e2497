"""open_clip's image towers."""
