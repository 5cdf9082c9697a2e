"""From files to packs: rows, formats, chat templates, tokens, masks and packing."""
