"""`python -m megatron_hdpo train|evaluate|check|plan|report|doctor`."""

from megatron_hdpo.cli import main

if __name__ == "__main__":
    main()
