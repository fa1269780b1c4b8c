"""`python -m convert SRC DST` from a checkout: the same as `bertjax convert SRC DST` once installed."""

from bertjax.cli import convert

convert(prog_name="python -m convert")
