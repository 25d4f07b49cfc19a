"""`python -m recursivemas`: the command line where its script cannot be named, under `torchrun -m` for one."""

from recursivemas.cli.main import main

if __name__ == "__main__":
    main()
