from vtok.eval.training.scenes.train import main

main()
