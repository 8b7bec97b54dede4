"""Which examples a step takes, in which order, and where a run was."""
