"""Pictures and pages from JSON files: pure functions, no model code."""
