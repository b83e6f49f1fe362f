"""Step 2, analyze: what quantization breaks, and the plots and pages that show it."""
