"""The commands, a file each; ``exporter.cli`` imports the one that is called."""
