"""Files on disk, whatever they hold: written whole or not at all, checked, continued after a kill."""
