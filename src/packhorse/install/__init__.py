"""Installing: requirements → a new generation of `packages/`, checked before it comes into force."""
