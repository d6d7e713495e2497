"""`python -m vtok.eval.training.pages`."""

from vtok.eval.training.pages.train import main

main()
