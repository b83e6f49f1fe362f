"""The plots of a plan."""
