"""A model executed a layer at a time, from a checkpoint on disk or from windows that are kept."""
