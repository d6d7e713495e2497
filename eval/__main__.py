"""`python -m vtok.eval` is the `vtok` program."""

from vtok.eval.cli import main

main()
