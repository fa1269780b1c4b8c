"""`python -m bertjax`."""

from bertjax.cli import main

main(prog_name="bertjax")
