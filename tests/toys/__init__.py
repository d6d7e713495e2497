"""What CONTRIBUTING's recipes add, each in a file of its own; `tests/test_recipes.py` registers them and runs the suites."""
