"""Questions about images: asking, scoring, records."""
