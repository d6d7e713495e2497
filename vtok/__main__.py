"""`python -m vtok` is the program `vtok`."""

from vtok.eval.cli import main

main()
