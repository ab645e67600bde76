"""The reference engine: integer-exact, in torch, on any device; the definition that every other engine must match."""
