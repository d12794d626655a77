"""How files are written whole and read back: one place for every format."""
