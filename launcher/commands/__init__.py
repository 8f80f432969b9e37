"""The commands of amlaunch, one module each."""
