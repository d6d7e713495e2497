from vtok.eval.training.pages.train import main

main()
