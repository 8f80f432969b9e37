"""The version of amlaunch, readable where the distribution is not installed (a mounted code snapshot)."""

VERSION = "0.1.0"
