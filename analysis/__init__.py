"""Error tables, super weights, plots and the HTML report."""
