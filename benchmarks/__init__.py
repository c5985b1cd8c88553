"""Steps and pipelines beside their public peers; see RESULTS.md."""
