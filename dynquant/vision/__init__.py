"""Vision-language models: their processors and samples with images, roles of their parts, calibration and planning."""
