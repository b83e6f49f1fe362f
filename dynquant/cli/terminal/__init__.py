"""Everything that people see of a command: the only code that prints."""
