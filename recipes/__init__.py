"""The recipe format, the recipes that come with amlaunch, and what all processes share: files, exit codes, the layout of a run directory."""
