"""Columns of a block of int4 codes (see int4.py): what the codec and its kernels share."""

BLOCK = 128
