"""For those who write methods: tiny models of every supported family, oracles, and suites of tests that every method passes."""
