from vtok.eval.training.atp.train import main

main()
