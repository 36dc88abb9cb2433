"""`python -m megatron_hdpo COMMAND`: the same as the command `megatron_hdpo`."""

from megatron_hdpo.cli import main

if __name__ == "__main__":
    main()
