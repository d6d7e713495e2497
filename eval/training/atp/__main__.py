"""`python -m vtok.eval.training.atp`."""

from vtok.eval.training.atp.train import main

main()
