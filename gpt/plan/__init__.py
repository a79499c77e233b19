"""Plans for devices that this machine does not have: programs are compiled and counted, not run."""
