"""Programs and launchers beside the run scripts at the root."""
