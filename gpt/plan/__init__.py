"""What a run would take of devices that are not here: compiled for them, counted, not run."""
