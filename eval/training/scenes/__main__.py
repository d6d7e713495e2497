"""`python -m vtok.eval.training.scenes`."""

from vtok.eval.training.scenes.train import main

main()
