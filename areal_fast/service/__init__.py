"""The processes of the proxy: supervisor, workers, cleaner, and the routes that workers serve."""
