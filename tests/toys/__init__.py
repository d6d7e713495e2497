"""What the recipes of CONTRIBUTING add, each in its file; `tests/e2e/test_recipes.py` registers them and runs the suites."""
