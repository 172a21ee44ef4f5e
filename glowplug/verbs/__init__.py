"""One file per verb; each has a click command object named `command`."""
