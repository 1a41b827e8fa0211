"""Models in and out of other people's formats; SETTINGS.md lists what becomes of their settings."""
