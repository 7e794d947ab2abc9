"""The bytes of a cache: one shared region, the extents in it, and how another process opens them."""
