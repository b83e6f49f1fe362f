"""The vision tower and projector of vision-language models."""
