"""areal_fast inside other systems: what an installed AReaL is given, without editing it."""
