"""`python -m convert SRC DST` from a checkout: the same as `bertjax convert SRC DST` once installed."""

import sys

from bertjax.cli import main

main(["convert", *sys.argv[1:]], prog_name="python -m convert")
