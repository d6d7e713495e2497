"""Training of the reference models and of ATP's modules; each resumes wherever it stopped."""
