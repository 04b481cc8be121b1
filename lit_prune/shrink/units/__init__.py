"""The units of a block: where they are, which are needed least, and blocks that have fewer of them."""
