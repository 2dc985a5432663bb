"""`python -m smore_cli` is the `smore` command (what `accelerate launch -m` and `torchrun -m` start)."""

from smore_cli.cli import main

if __name__ == "__main__":
    main()
