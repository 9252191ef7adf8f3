"""python -m cutnmix.trainer: the command line, for torchrun and for machines without the console script."""

from cutnmix.trainer.cli import main

main()
