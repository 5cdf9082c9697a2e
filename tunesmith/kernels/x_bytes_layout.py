"""A block of an input in two bytes a value (see x_bytes.py): what the reference and its kernels share."""

# Words of a block, and where its scale is; its sums are behind that.
BLOCK_WORDS = 72
SCALE_AT = 64
# The largest code: its high byte is 127, and so is the next one's below the half.
LARGEST_CODE = 127 * 256
# Below that a block's values are nothing.
SMALLEST_SCALE = 2.0**-125
