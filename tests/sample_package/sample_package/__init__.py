"""A package from outside burnish with one of each kind that plugs in; its entry points lie beside it."""
