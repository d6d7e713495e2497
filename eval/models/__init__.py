"""Models by name, the reference models that come with vtok, and their data."""
